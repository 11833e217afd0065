"""Quantise the demo model and a pruned one: every calibrator, layers by hand and by search, training with the rounding in place; evaluate all on held-out streets.

    python .ci/gpu_quantize.py --out quantize.json --work /tmp/quantize --seconds 560 --pruned pruned.tar

`--pruned` is a model that `.ci/gpu_prune.py --keep` wrote. Every job is a process of its own; they share the GPUs through CUDA's multi-process
service where it is installed. The figures that the documentation shows are tests_data/measured/quantize_demo.json. No test street is in training
or calibration, and what was chosen was chosen on other streets, `dev`. The search alone, against the list by hand at an equal share, on a CPU
(tests_data/measured/mixed_demo.json; stopped, the same command goes on):

    python .ci/gpu_quantize.py --out mixed.json --work /tmp/quantize --seconds 9000 --pruned pruned.tar --device cpu --only whole_search pruned_search --lists equal --trials 20 --variants 0
"""
import argparse,copy,json,os,platform,shlex,subprocess,sys,tarfile,time
from multiprocessing import Pool
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from gpu_prune import Kept,TD,VOXELS,WORLDS,open_data,score,share_gpus,stop
from bevorin.core import InputError,read_json,write_json

METHODS = ('max','percentile','entropy','mse')
TUNE = dict(learned={}, fixed=dict(learn=False), untaught=dict(taught=False))
# what is quantised: the rules' layers, everything, what the search leaves
JOBS = {f'{m}_{k}':dict(model=m, kind=k) for m in ('whole','pruned') for k in ('float', *METHODS, *(f'all_{c}' for c in METHODS), 'search', *(f'qat_{t}' for t in TUNE if m == 'whole' or t == 'learned'))}

def make(a):
    "Streets and samples, once: augmented ones to train on, plain ones to calibrate and to test on."
    from bevorin.data.synthetic import synth
    for k,w in WORLDS.items():
        if not (a.work/k).is_dir(): synth(a.work/k, scenes=dict(train=a.scenes, dev=a.dev_scenes, test=a.test_scenes)[k], **w, frames=20, image=(225,400), sweeps=4, steps=724, progress=False)
    n = len(open_data(a, 'train')[2])
    for k,source,which in (('train','train',range(n*a.variants)), ('calibrate','train',np.linspace(0, n-1, a.frames).round().astype(int).tolist()), ('dev','dev',range(20*a.dev_scenes)), ('test','test',range(20*a.test_scenes))):
        folder = a.work/f'{k}_samples'
        if folder.is_dir(): continue
        tmp = a.work/f'{k}_samples.part'
        tmp.mkdir(exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        with Pool(cores) as p: p.starmap(store, [(a, source, k == 'train', tmp, list(which)[i::cores]) for i in range(cores)])
        tmp.rename(folder)
    print('samples', round(time.time()-a.start), 's', flush=True)

def store(a, source, train, folder, which):
    from bevorin.data.nuscenes import NuScenesDataset
    from bevorin.optimize.qat import weak_augmentation
    cfg,nusc,_ = open_data(a, source)
    data = NuScenesDataset(weak_augmentation(cfg), a.work/source, [s['name'] for s in nusc.scene], train=train, sweeps=4, nusc=nusc, progress=False)
    for i in which:
        s = data.load(i%len(data), np.random.default_rng([9,i]) if train else None)
        np.savez(folder/f'{i}.npz', **{n:v for n,v in s.items() if isinstance(v, np.ndarray)}, _=json.dumps({n:v for n,v in s.items() if not isinstance(v, np.ndarray)}, default=float))

def samples(folder):
    for f in sorted(folder.iterdir(), key=lambda f: int(f.stem)):
        with np.load(f) as z: yield {**{k:z[k] for k in z.files if k != '_'}, **json.loads(str(z['_']))}

def held_out(a, q, which, lists, device):
    "Damage and accuracy of lists of layers in floating point on streets that nothing was measured on, each frame computed once for each."
    import torch
    from bevorin.data.nuscenes import collate
    from bevorin.optimize.quantize import enable
    from bevorin.optimize.sensitivity import Reference
    from bevorin.train.losses import model_inputs
    class Played(Reference):
        "Outputs that were kept, in place of a model."
        def __init__(self, ref, got): self.inputs,self.maps,self.raw,self.got = range(len(ref)),[{}]*len(ref),ref,got
        def branches(self, net, x, kept): return x
        def heads(self, net, x): return self.got[x]
    kept,raw = Kept(a.work/f'{which}_samples'),{k:[] for k in ('float',*lists)}
    for i in range(len(kept)):
        x = model_inputs(collate([kept[i]]), device)
        for k in raw:
            enable(q, '*', k != 'float')
            for n in lists.get(k, ()): enable(q, n, False)
            with torch.no_grad(): raw[k].append(q.eval().raw(**x))
    enable(q)
    lost = lambda got, ref: Played(ref, got).damage(q, ())
    points,each = {},{k:np.array([lost([g], [r]) for g,r in zip(raw[k], raw['float'])]) for k in lists}
    for k in lists:
        outputs = iter(raw[k])
        q.forward = lambda **x: [s for _ in x['points'] for s in q.decode(next(outputs))]
        points[k] = score(a, q, which, device)
        del q.forward
    first,mean = next(iter(lists)),lambda d: [round(float(d.mean()), 5),round(float(d.std(ddof=1)/len(d)**.5), 5)]
    less = lambda d: dict(by_frame=mean(d), by_street=mean(d.reshape(-1,20).mean(1)), frames=int((d > 0).sum()), streets=int((d.reshape(-1,20).mean(1) > 0).sum()))
    return dict(frames=len(kept), together={k:round(lost(raw[k], raw['float']), 5) for k in lists}, by_frame={k:round(float(each[k].mean()), 5) for k in lists}, less={k:less(each[first]-each[k]) for k in lists if k != first}),points

def child(a):
    import torch
    from bevorin.config import load_config
    from bevorin.data.nuscenes import collate
    from bevorin.model.bevfusion import build_model,load_checkpoint
    from bevorin.optimize.mixed import keep_float,layer_damage,search
    from bevorin.optimize.complexity import complexity
    from bevorin.optimize.qat import qat,qat_settings
    from bevorin.optimize.quantize import KEEP,layer_report,load_quantized,place,quantize,save_quantized,fold_norms
    from bevorin.optimize.shrink import load_pruned
    from bevorin.train.loop import TrainLoader,read_log
    torch.set_num_threads(1)
    job,dev = JOBS[a.child],torch.device(a.device)
    folder = a.work/'jobs'/a.child
    folder.mkdir(parents=True, exist_ok=True)
    if (folder/'result.json').is_file(): return
    say = lambda *w: print(a.child, *w, round(time.time()-a.start), 's', flush=True)
    if job['model'] == 'whole':
        cfg = load_config(TD/'configs/demo.yaml')
        net = build_model(cfg).eval(); load_checkpoint(net, TD/'demo_model/model.pth')
    else: net,cfg,_ = load_pruned(a.work/'pruned_model')
    net.to(dev)
    teacher = build_model(load_config(TD/'configs/demo.yaml')).eval(); load_checkpoint(teacher, TD/'demo_model/model.pth'); teacher.to(dev)
    frames = [collate(list(p)) for p in np.array_split([*samples(a.work/'calibrate_samples')], a.frames//4)] if job['kind'] != 'float' else []
    macs = complexity(cfg, VOXELS).macs
    folded = copy.deepcopy(net); fold_norms(folded)
    whole = sum(macs.get(n, 0) for n in place(folded, [])[0])
    res = dict(name=a.child, **job)
    def shares(recipe): return dict(int8_layers=len(recipe['layers']), int8_macs=round(sum(macs.get(n, 0) for n in recipe['layers'])/whole, 4), int8_parameters=round(recipe['parameters']['int8']/sum(recipe['parameters'].values()), 4))
    def judge(m, recipe=None): return dict(dev=score(a, m, 'dev', dev), test=score(a, m, 'test', dev), **(shares(recipe) if recipe else {}))
    kind,lib = job['kind'],'pytorch_quantization'
    def start(how):
        if not (folder/'start'/'quantize.json').is_file(): save_quantized(*quantize(net, frames, how, lib, progress=False), folder/'start')
        q,recipe = load_quantized(cfg, folder/'start')
        return q.to(dev),recipe
    if kind == 'float': res.update(judge(net))
    elif kind in METHODS or kind.startswith('all_'):
        q,recipe = quantize(net, frames, dict(method=kind.removeprefix('all_'), **({} if kind in METHODS else dict(keep=[]))), lib, progress=False)
        worst = layer_report(q, frames[:2])
        res.update(judge(q, recipe), worst=[{k:r[k] for k in ('name','output_db','weight_db','clipped')} for r in worst.worst(6)])
    elif kind == 'search':
        q,recipe = start(dict(method='mse', keep=[]))
        found = layer_damage(q, cfg, frames[:3], VOXELS, journal=folder/'layers.jsonl', progress=False)
        say('layers measured')
        part = {r['name']:r['macs'] for r in found['layers']}
        by_hand = [n for n in place(folded, KEEP)[1] if n in part]
        share = sum(part[n] for n in by_hand)
        variants = dict(equal=dict(share=share, starts=[by_hand]), half=dict(share=share/2), most=dict(share=3*share, starts=[by_hand]), budget=dict(budget=.02))
        lists = dict(by_hand_mse=by_hand)
        alone = np.array([r['damage'] for r in found['layers']])
        res.update(measured=dict(frames=sum(len(f['points']) for f in frames[:3]), all=found['all'], sum_alone=round(float(alone.sum()), 5), root_of_squares=round(float((alone**2).sum()**.5), 5)), searched_on=sum(len(f['points']) for f in frames[3:]), by_hand=dict(layers=len(by_hand), float_macs=round(share, 4)), found={})
        for k in a.lists:
            try: m = search(q, found, frames[3:], **variants[k], trials=a.trials, journal=folder/'lists.jsonl', progress=False)
            except InputError as e: res['found'][k] = dict(error=str(e)); continue
            lists[k] = m['keep']
            if 'starts' in variants[k]: res['by_hand']['damage'] = m['starts'][0]['damage']
            res['found'][k] = dict({x:m[x] for x in ('damage','int8_share','budget','share','starts')}, keep=len(m['keep']), more=sorted({*m['keep']}-{*by_hand}), less=sorted({*by_hand}-{*m['keep']}), tried=[p['damage'] for p in m['tried']])
            say(k, m)
        res['damage_held_out'] = {}
        res['scores'] = {k:{} for k in lists}
        for which in ('dev','test'):
            res['damage_held_out'][which],points = held_out(a, q, which, lists, dev)
            for k in lists: res['scores'][k][which] = {n:points[k][n] for n in ('mAP','NDS','mIoU')}
            say(which, res['damage_held_out'][which], {k:v[which] for k,v in res['scores'].items()})
        for k,names in lists.items(): res['scores'][k].update(shares(keep_float(copy.deepcopy(q), recipe, names)))
    else:
        how = TUNE[kind.removeprefix('qat_')]
        q,recipe = start(dict(method='mse'))
        train = Kept(a.work/'train_samples', a.steps*a.batch)
        settings = qat_settings(cfg, epochs=1, lr=a.lr, amp='bf16' if dev.type == 'cuda' else None, ema=.98, warmup_steps=20)
        say('calibrated')
        recipe = qat(q, recipe, cfg, TrainLoader(train, a.batch, workers=2), folder/'run', teacher if how.get('taught', True) else None, settings, how.get('learn', True), resume=True, device=dev, log_every=10, save_every=10**6, progress=False)
        q.to(dev)
        save_quantized(q, recipe, folder/'quantized')
        say('trained')
        res.update(judge(q, recipe), steps=a.steps, samples=a.steps*a.batch, seconds_a_step=round(float(np.median(read_log(folder/'run')['seconds'])), 3))
    write_json(res, folder/'result.json')
    if 'dev' in res: say('dev', res['dev']['mAP'], res['dev']['mIoU'], 'test', res['test']['mAP'], res['test']['mIoU'])

def parent(a):
    from bevorin.optimize.profile import hardware,versions
    import torch
    jobs = [j for j in JOBS if not a.only or j in a.only]
    make(a)
    if not (a.work/'pruned_model').is_dir():
        with tarfile.open(a.pruned) as t: t.extractall(a.work/'pruned.part', filter='data')
        next((a.work/'pruned.part').iterdir()).rename(a.work/'pruned_model')
    mps = a.device == 'cuda' and share_gpus()
    gpus = torch.cuda.device_count() if a.device == 'cuda' else 0
    order = sorted((j for j in jobs if not (a.work/'jobs'/j/'result.json').is_file()), key=lambda j: (not JOBS[j]['kind'].startswith('qat'), JOBS[j]['kind'] != 'search'))
    own = [f'--{k}={getattr(a, k)}' for k in ('work','out','batch','steps','lr','frames','variants','start','scenes','trials')]+['--lists',*a.lists]
    waiting,running,end = list(enumerate(order)),{},a.start+a.seconds
    while (waiting or any(p.poll() is None for p in running.values())) and time.time() < end-10:
        while waiting and sum(p.poll() is None for p in running.values()) < a.at_once:
            i,j = waiting.pop(0)
            running[j] = subprocess.Popen([sys.executable, __file__, '--child', j, '--device', f'cuda:{i%gpus}' if gpus else 'cpu', *own], stderr=open(a.work/f'{j}.err', 'w'))
        time.sleep(.3)
    stop(a, running, end)
    if mps: subprocess.run('echo quit | nvidia-cuda-mps-control', shell=True)
    found = {j:read_json(f) for j in jobs for f in [a.work/'jobs'/j/'result.json'] if f.is_file()}
    trained = any('steps' in r for r in found.values())
    write_json(dict(what='the demo model and a pruned one in INT8, evaluated on held-out synthetic streets', kind='measured', date=time.strftime('%Y-%m-%d', time.gmtime()), hardware=dict(hardware(torch.device('cuda:0')), gpus=gpus, shared='multi-process service' if mps else 'in turns') if gpus else f"{platform.machine().replace('_', '-')} CPU, {len(os.sched_getaffinity(0))} cores", versions=versions(),
        command=shlex.join(['python','.ci/gpu_quantize.py',*(['--steps',str(a.steps),'--batch',str(a.batch),'--lr',f'{a.lr:g}'] if trained else []),*(['--device',a.device] if not gpus else []),*(['--only',*a.only,'--lists',*a.lists,'--trials',str(a.trials)] if a.only else [])]), backend='pytorch_quantization 2.1.3', voxels=VOXELS, worlds=WORLDS, scenes=a.scenes, calibration_frames=a.frames, jobs=found,
        **(dict(batch=a.batch, steps=a.steps, training=f'bf16, cosine from lr {a.lr:g}, scales ten times that in proportion, EMA 0.98; the unpruned float model teaches (heatmap 1, map classes 0.5, boxes 1), weak augmentation') if trained else {})), a.out)
    for j in set(a.keep) & set(found):
        with tarfile.open(a.out.parent/f'{j}.tar', 'w') as t: t.add(a.work/'jobs'/j/'quantized', j)
    print(len(found), 'of', len(jobs), 'done', round(time.time()-a.start), 's', flush=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', type=Path, default='quantize.json'); ap.add_argument('--work', type=Path, default='/tmp/quantize'); ap.add_argument('--pruned', type=Path)
    for k,v,h in (('seconds',560.,'of this command'), ('start',0.,argparse.SUPPRESS), ('lr',5e-5,'of the weights')): ap.add_argument(f'--{k}', type=float, default=v, help=h)
    for k,v,h in (('scenes',60,'streets to train on'), ('dev-scenes',5,'streets to choose on'), ('test-scenes',10,'streets to test on'), ('variants',2,'of each sample, augmented'), ('frames',32,'to calibrate on'), ('batch',16,''), ('steps',300,'of training'), ('at-once',14,'processes'), ('trials',100,'lists that a search measures')): ap.add_argument(f'--{k}', type=int, default=v, help=h)
    ap.add_argument('--device', default='cuda'); ap.add_argument('--child', help=argparse.SUPPRESS); ap.add_argument('--only', nargs='+'); ap.add_argument('--keep', nargs='+', default=[]); ap.add_argument('--lists', nargs='+', default=['equal','half','most','budget'], help='of the search')
    a = ap.parse_args()
    a.start = a.start or time.time()
    for d in (a.work, a.out.parent): d.mkdir(parents=True, exist_ok=True)
    child(a) if a.child else parent(a)

if __name__ == '__main__': main()
