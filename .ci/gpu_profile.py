"""Profile the full-size model and the demo model in eager PyTorch and compiled, on a GPU machine. torch, numpy and this clone (with PyYAML and Pillow) are enough.

    python .ci/gpu_profile.py --out profile.json                              all of them: some minutes
    python .ci/gpu_profile.py --out p.json --only full_fp16 --trace t.json    one, with its timeline
    python .ci/gpu_profile.py --out profile.json --done p.json                the rest, after a run that was cut short on the same kind of machine
    python .ci/gpu_profile.py --out p.json --device cpu --small --runs 2      a try on a CPU: the demo model, eager

Each measurement is written as soon as it is there; one that fails leaves its reason in its place. The figures that the
documentation shows are tests_data/measured/profile.json.
"""
import argparse,shlex,sys,time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from bevorin.config import load_config
from bevorin.core import InputError,check_writable,read_json,write_json
from bevorin.model.bevfusion import build_model,load_checkpoint
from bevorin.model.golden import init_weights
from bevorin.optimize.profile import check_settings,hardware,made_frame,profile,versions

MODELS = dict(full=('multi-task model, full size', 'multitask_det_seg.json', None), demo=('demo model', 'demo.yaml', 'demo_model/model.pth'))
WAYS = dict(fp32=('fp32',False), tf32=('tf32',False), fp16=('fp16',False), fp32_compiled=('fp32',True), fp16_compiled=('fp16',True))

def jobs(a, device):
    "Name, model, precision and whether compiled of each measurement, the slow (compiled) ones last."
    ways = {k:v for k,v in WAYS.items() if device.type == 'cuda' or k == 'fp32' or (k.startswith('fp32') and not a.small)}
    res = {f'{m}_{w}':(m, *v) for slow in (False,True) for m in (['demo'] if a.small else MODELS) for w,v in ways.items() if v[1] == slow}
    if odd := [o for o in a.only or () if o not in res]: raise InputError(f"--only {odd[0]}: there are {', '.join(res)}")
    return {k:v for k,v in res.items() if not a.only or k in a.only}

def earlier(path, res):
    "The measurements of an earlier run on such a machine."
    d = read_json(path)
    for k in ('hardware','versions'):
        if d.get(k) != res[k]: raise InputError(f'{path} was measured with another {k}: {d.get(k)}, here {res[k]}')
    return {k:p for k,p in d['profiles'].items() if 'error' not in p}

def load(name):
    "A model with its weights, a made-up frame of its size, and words about both."
    title,config,weights = MODELS[name]
    td = ROOT/'tests_data'
    cfg = load_config(td/'configs'/config)
    model = build_model(cfg)
    if weights: load_checkpoint(model, td/weights)
    else: init_weights(model)
    return title,model,made_frame(cfg),dict(config=config, weights=weights or 'made up from their names', frame='made up: noise for images, a cloud of ten sweeps')

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', required=True, help='the JSON file to write')
    ap.add_argument('--device', help='by default the GPU')
    ap.add_argument('--runs', type=int, default=100)
    ap.add_argument('--warmup', type=int, default=10)
    ap.add_argument('--only', nargs='+', metavar='NAME', help='these measurements alone: full_fp16 …')
    ap.add_argument('--small', action='store_true', help='the demo model alone, on a CPU in eager FP32 alone')
    ap.add_argument('--done', help='the file of an earlier run: what it measured is taken over')
    ap.add_argument('--trace', help='a timeline of the last measurement, .json or .json.gz')
    a = ap.parse_args(argv)
    try:
        check_writable(a.out)
        device = check_settings(None, a.runs, a.warmup, a.device or 'cuda', trace=a.trace)
        todo = jobs(a, device)
    except InputError as e: ap.error(str(e))
    res = dict(what='a frame in PyTorch, part by part: milliseconds; parts by CUDA events (CPU: perf_counter), inputs already on the device', kind='measured',
        date=time.strftime('%Y-%m-%d', time.gmtime()), hardware=hardware(device), versions=versions(),
        command=shlex.join(['python', '.ci/gpu_profile.py', *(Path(o).name if o in (a.out,a.trace,a.done) else o for o in (argv or sys.argv[1:]))]), profiles={})
    try: res['profiles'] = earlier(a.done, res) if a.done else {}
    except InputError as e: ap.error(str(e))
    todo = {k:v for k,v in todo.items() if k not in res['profiles']}
    at,failed = None,0
    write_json(res, a.out)
    for k,(m,precision,compile) in todo.items():
        start = time.time()
        try:
            if m != at: (title,model,frame,about),at = load(m),m
            p = profile(model, frame, a.runs, a.warmup, device, precision, compile, trace=a.trace if k == [*todo][-1] else None, name=f'{title}, {k.partition("_")[2].replace("_", ", ")}', about=about)
            res['profiles'][k] = {i:v for i,v in p.brief().items() if i not in ('kind','date','hardware','versions')}
            print(f"{k}: {p['frame']['median_ms']:.2f} ms (P95 {p['frame']['p95_ms']:.2f}), the parts cover {p['covered_percent']:.1f} %, {time.time()-start:.0f} s", flush=True)
        except Exception as e:
            failed += 1
            res['profiles'][k] = dict(error=str(e) if isinstance(e, InputError) else f'{type(e).__name__}: {e}'[:600])
            print(f"{k}: {res['profiles'][k]['error']}", flush=True)
        write_json(res, a.out)
        if device.type == 'cuda': torch.cuda.empty_cache()
    return int(failed > 0)

if __name__ == '__main__': sys.exit(main())
