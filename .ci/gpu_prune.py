"""Prune the demo model to several budgets, by several importances, distributed by sensitivity or uniformly; fine-tune all in the same way; evaluate on held-out streets.

    python .ci/gpu_prune.py --out prune.json --work /tmp/prune --seconds 560 --left 280      streets, samples, pruning, training as long as there is time
    python .ci/gpu_prune.py --out prune.json --work /tmp/prune --seconds 280                 the same command goes on from there

Every model is trained by a process of its own, spread over the GPUs, for a number of steps that is the same for all and found by a trial
of some steps of all of them at once: `--seconds` of this command and `--left` of the next. The processes share a GPU through CUDA's
multi-process service where it is installed (one after another otherwise, which is several times slower). The figures that the documentation
shows are tests_data/measured/prune_demo.json. The streets are those of `bevorin synth`; no test street is in training, and what was chosen
was chosen on other streets, `dev`. The models of --keep are written beside --out.
"""
import argparse,copy,json,os,shlex,shutil,signal,subprocess,sys,tarfile,time
from multiprocessing import Pool,Process
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
from bevorin.core import read_json,write_json

TD,VOXELS = ROOT/'tests_data',9000
BUDGETS = {'20':dict(macs=.2), '32':dict(macs=.32), '44':dict(params=.45, macs=.44), '56':dict(macs=.56)}
WORLDS = dict(train=dict(seed=50, version='v1.0-trainval'), dev=dict(seed=60, version='v1.0-mini'), test=dict(seed=40, version='v1.0-mini'))
TEACH = dict(heatmap=1., map_classes=.5, boxes=1.)
JOBS = {**{f'{b}_{i}':dict(budget=b, importance=i, most=.5) for b in BUDGETS for i in ('taylor','l2','random')}, **{f'{b}_uniform':dict(budget=b, importance='taylor', uniform=True) for b in ('44','56')},
        '44_most75':dict(budget='44', importance='taylor', most=.75), '44_most375':dict(budget='44', importance='taylor', most=.375), '44_map_alike':dict(budget='44', importance='taylor', most=.5, teach=dict(heatmap=1., map=1., boxes=1.)), 'whole':{}}

def open_data(a, which):
    from bevorin.config import load_config
    from bevorin.data.nuscenes import NuScenesDataset,open_nuscenes
    cfg,nusc = load_config(TD/'configs/demo.yaml'),open_nuscenes(a.work/which)
    return cfg,nusc,NuScenesDataset(cfg, a.work/which, [s['name'] for s in nusc.scene], train=which == 'train', sweeps=4, nusc=nusc, progress=False)

def plan_file(a, job): return a.work/f"plan_{job['budget']}_{'uniform' if job.get('uniform') else job['most']}.json"

def plan(a, job):
    "Ratios that reach a budget."
    import torch
    from bevorin.config import load_config
    from bevorin.model.bevfusion import build_model
    from bevorin.optimize.prune import reach
    from bevorin.optimize.sensitivity import Sensitivity,distribute
    torch.set_num_threads(1)
    cfg = load_config(TD/'configs/demo.yaml')
    model = build_model(cfg).eval()
    how = reach(model, cfg, .3, BUDGETS[job['budget']], voxels=VOXELS) if job.get('uniform') else distribute(Sensitivity(read_json(a.sens)), model, cfg, BUDGETS[job['budget']], most=job['most'])
    write_json(how, plan_file(a, job))

def make(a, jobs):
    "Ratios, streets and samples, once."
    from bevorin.data.synthetic import synth
    plans = {plan_file(a, j):j for j in map(JOBS.get, jobs) if j}
    planning = [Process(target=plan, args=(a, j)) for f,j in plans.items() if not f.is_file()]
    for p in planning: p.start()
    for k,w in WORLDS.items():
        if not (a.work/k).is_dir(): synth(a.work/k, scenes=dict(train=a.scenes, dev=a.dev_scenes, test=a.test_scenes)[k], **w, frames=20, image=(225,400), sweeps=4, steps=724, progress=False)
        print(k, 'streets', round(time.time()-a.start), 's', flush=True)
    for k,variants in (('train',a.variants), ('dev',1), ('test',1)):
        folder,n = a.work/f'{k}_samples',len(open_data(a, k)[2])*variants
        if folder.is_dir(): continue
        tmp = a.work/f'{k}_samples.part'
        tmp.mkdir(exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        with Pool(cores) as p: p.starmap(keep, [(a, k, tmp, range(i, n, cores)) for i in range(cores)])
        tmp.rename(folder)
        print(k, n, 'samples', round(time.time()-a.start), 's', flush=True)
    for p in planning: p.join()
    print('ratios', round(time.time()-a.start), 's', flush=True)

def keep(a, k, folder, which):
    data = open_data(a, k)[2]
    for i in which:
        s = data.load(i%len(data), np.random.default_rng([7,i]) if k == 'train' else None)
        np.savez(folder/f'{i}.npz', **{n:v for n,v in s.items() if isinstance(v, np.ndarray)}, _=json.dumps({n:v for n,v in s.items() if not isinstance(v, np.ndarray)}, default=float))

class Kept:
    "Samples read back; as many as asked for."
    def __init__(self, folder, n=None): self.folder,self.have = folder,len(list(folder.iterdir())); self.n = n or self.have
    def __len__(self): return self.n
    def __getitem__(self, i):
        with np.load(self.folder/f'{i%self.have}.npz') as z: return {**{k:z[k] for k in z.files if k != '_'}, **json.loads(str(z['_']))}

def score(a, model, which, device):
    "Accuracy on the kept samples of some streets, in percent."
    from bevorin.data.nuscenes import collate
    from bevorin.train.evaluate import TorchPredictor,evaluate
    nusc,kept = open_data(a, which)[1],Kept(a.work/f'{which}_samples')
    r = evaluate(TorchPredictor(model.eval(), device), [collate([kept[i] for i in range(j, min(j+5, len(kept)))]) for j in range(0, len(kept), 5)], nusc, progress=False)
    return {**{k:round(100*r.headline[k], 2) for k in ('mAP','NDS','mIoU')}, 'classes':{'AP':{k:round(100*v['AP'], 1) for k,v in r['detection']['classes'].items() if v.get('AP') is not None}, 'IoU':{k:round(100*v['IoU'], 1) for k,v in r['segmentation']['classes'].items()}}}

def child(a):
    import torch
    from bevorin.config import load_config
    from bevorin.core import write_json
    from bevorin.model.bevfusion import build_model,load_checkpoint
    from bevorin.optimize.shrink import load_pruned,save_pruned,shrink
    from bevorin.train.loop import TrainLoader,collate,fit,read_log
    from bevorin.train.losses import distill
    from bevorin.train.optim import measure_norms,settings_from
    torch.set_num_threads(1)
    job,folder,dev = JOBS[a.child],a.work/'jobs'/a.child,torch.device(a.device)
    folder.mkdir(parents=True, exist_ok=True)
    res,say = dict(name=a.child, **job),lambda *w: print(a.child, *w, round(time.time()-a.start), 's', flush=True)
    if (folder/'result.json').is_file(): return
    cfg = load_config(TD/'configs/demo.yaml')
    base = build_model(cfg).eval(); load_checkpoint(base, TD/'demo_model/model.pth'); base.to(dev)
    train = Kept(a.work/'train_samples')
    some = lambda n: [collate([train[int(i)] for i in part]) for part in np.array_split(np.linspace(0, len(train)-1, 8*n).round().astype(int), n)]
    if not job: net,net_cfg,report = copy.deepcopy(base),cfg,None
    elif (folder/'pruned/prune.json').is_file(): net,net_cfg,report = load_pruned(folder/'pruned')
    else:
        ratio = read_json(plan_file(a, job))
        net,net_cfg,report = shrink(base, cfg, ratio, job['importance'], voxels=VOXELS, batches=some(4) if job['importance'] == 'taylor' else None)
        measure_norms(net, some(6), progress=False)
        save_pruned(net, net_cfg, report, folder/'pruned')
        say('pruned', {k:v['less_percent'] for k,v in report.summary().items()})
    net.to(dev)
    settings = settings_from(net_cfg, epochs=1, amp='bf16' if dev.type == 'cuda' else None, ema=.99, lr=1e-4)
    def go(model, steps, out): return fit(model, TrainLoader(Kept(a.work/'train_samples', steps*a.batch), a.batch, workers=2), net_cfg, out, settings, resume=True, extra_loss=distill(base, job.get('teach', TEACH)), device=dev, log_every=10, save_every=10**6, progress=False)
    if not (a.work/'steps').is_file():
        (folder/'ready').touch()
        while not (a.work/'go').is_file(): time.sleep(.2)    # a trial of some alone would promise too much
        probe = folder/f'probe{os.getpid()}'
        go(copy.deepcopy(net), a.probe, probe)
        write_json(float(np.mean(read_log(probe)['seconds'][1:])), folder/'probe.json')
        while not (a.work/'steps').is_file(): time.sleep(.2)
    steps = int((a.work/'steps').read_text())
    out = go(net, steps, folder/'run')
    net = build_model(net_cfg); net.load_state_dict(torch.load(out['model'], map_location='cpu', weights_only=True)['state_dict'], strict=True)
    say('trained', steps)
    if report: save_pruned(net, net_cfg, report, folder/'tuned')
    res.update(steps=steps, samples=steps*a.batch, loss=float(np.mean(read_log(folder/'run')['loss'][-5:])), **({k:v for k,v in report.summary().items()} if report else {}), tuned=score(a, net, 'test', dev), dev=score(a, net, 'dev', dev))
    if not job: res.update(as_shipped=score(a, base, 'test', dev), as_shipped_dev=score(a, base, 'dev', dev))
    write_json(res, folder/'result.json')
    say('dev mAP', res['dev']['mAP'], 'mIoU', res['dev']['mIoU'], 'test mAP', res['tuned']['mAP'], 'mIoU', res['tuned']['mIoU'])

def share_gpus():
    "Start CUDA's multi-process service; whether it is there."
    if not (tool := shutil.which('nvidia-cuda-mps-control') or next((str(f) for f in Path('/usr/local/nvidia').rglob('nvidia-cuda-mps-control')), None)): return False
    os.environ.update(CUDA_MPS_PIPE_DIRECTORY='/tmp/mps', CUDA_MPS_LOG_DIRECTORY='/tmp/mps')
    Path('/tmp/mps').mkdir(exist_ok=True)
    return subprocess.run([tool, '-d']).returncode == 0

def stop(a, running, end):
    "End the processes that still run by a signal, after which they can be resumed; say which failed."
    for p in running.values():
        if p.poll() is None: p.send_signal(signal.SIGTERM)
    for j,p in running.items():
        try: p.wait(max(1, end+6-time.time()))
        except subprocess.TimeoutExpired: p.kill()
        if p.returncode: print(j, 'ended with', p.returncode, (a.work/f'{j}.err').read_text()[-600:], flush=True)

def parent(a):
    from bevorin.optimize.profile import hardware,versions
    import torch
    jobs = [j for j in JOBS if not a.only or j in a.only]
    make(a, jobs)
    mps = a.device == 'cuda' and a.mps and share_gpus()
    todo = [j for j in jobs if not (a.work/'jobs'/j/'result.json').is_file()]
    gpus = torch.cuda.device_count() if a.device == 'cuda' else 0
    cmd = lambda i,j: [sys.executable, __file__, '--child', j, '--device', f'cuda:{i%gpus}' if gpus else 'cpu', '--work', str(a.work), '--sens', str(a.sens), '--batch', str(a.batch), '--probe', str(a.probe), '--out', str(a.out), '--start', str(a.start)]
    running = {j:subprocess.Popen(cmd(i, j), stderr=open(a.work/f'{j}.err', 'w')) for i,j in enumerate(todo)}
    end,tail = a.start+a.seconds,a.tail
    while any(p.poll() is None for p in running.values()) and time.time() < end-8:
        alive = sum(p.poll() is None for p in running.values())
        if not (a.work/'go').is_file() and len([*(a.work/'jobs').glob('*/ready')]) >= alive: (a.work/'go').touch()
        if not (a.work/'steps').is_file():
            seconds = [read_json(f) for j in running for f in [a.work/'jobs'/j/'probe.json'] if f.is_file()]
            if len(seconds) >= alive and seconds:
                n = a.steps or int((end-time.time()-12 + max(0, a.left-30) - tail)/float(np.max(seconds)))
                (a.work/'steps').write_text(str(n)); print('steps', n, 'seconds a step', float(np.median(seconds)), round(time.time()-a.start), 's', flush=True)
        time.sleep(.5)
    stop(a, running, end)
    if mps: subprocess.run('echo quit | nvidia-cuda-mps-control', shell=True)
    plans = {f.stem.removeprefix('plan_'):r if 'uniform' not in f.stem else max(r.values()) for f in sorted({plan_file(a, JOBS[j]) for j in jobs if JOBS[j]}) for r in [read_json(f)]}
    found = {j:read_json(f) for j in jobs for f in [a.work/'jobs'/j/'result.json'] if f.is_file()}
    write_json(dict(what='the demo model pruned, fine-tuned and evaluated on held-out synthetic streets', kind='measured', date=time.strftime('%Y-%m-%d', time.gmtime()), hardware=dict(hardware(torch.device('cuda:0' if gpus else 'cpu')), gpus=gpus, shared='multi-process service' if mps else 'in turns'), versions=versions(),
        command=shlex.join(['python','.ci/gpu_prune.py','--scenes',str(a.scenes),'--batch',str(a.batch),'--seconds',f'{a.seconds:g}','--left',f'{a.left:g}']), voxels=VOXELS, budgets=BUDGETS, worlds=WORLDS, scenes=a.scenes, dev_scenes=a.dev_scenes, test_scenes=a.test_scenes, variants=a.variants, batch=a.batch,
        training='bf16, one cycle from lr 1e-4, batch norms trained, EMA 0.99; the unpruned model teaches', teach=TEACH, plans=plans, jobs=found), a.out)
    for j in set(a.keep) & set(found):
        with tarfile.open(a.out.parent/f'{j}.tar', 'w') as t: t.add(a.work/'jobs'/j/'tuned', j)
    print(len(found), 'of', len(jobs), 'done', round(time.time()-a.start), 's', flush=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', type=Path, default='prune.json'); ap.add_argument('--work', type=Path, default='/tmp/prune'); ap.add_argument('--sens', type=Path, default=TD/'measured/sensitivity_demo.json')
    for k,v,h in (('seconds',560,'of this command'),('left',0,'of a second one that goes on'),('tail',75,'kept for the evaluation'),('start',0,argparse.SUPPRESS)): ap.add_argument(f'--{k}', type=float, default=v, help=h)
    for k,v,h in (('scenes',120,'streets to train on'), ('dev-scenes',5,'streets to choose on, 20 frames each'), ('test-scenes',10,'streets to test on, 20 frames each'),('variants',2,'of each sample, augmented'),('batch',16,''),('probe',24,'steps of the trial'),('steps',0,'train so long, without a trial')): ap.add_argument(f'--{k}', type=int, default=v, help=h)
    ap.add_argument('--device', default='cuda'); ap.add_argument('--child', help=argparse.SUPPRESS); ap.add_argument('--only', nargs='+'); ap.add_argument('--keep', nargs='+', default=[]); ap.add_argument('--mps', type=int, default=1, help='0: take turns on a GPU')
    a = ap.parse_args()
    a.start = a.start or time.time()
    for d in (a.work, a.out.parent): d.mkdir(parents=True, exist_ok=True)
    child(a) if a.child else parent(a)

if __name__ == '__main__': main()
