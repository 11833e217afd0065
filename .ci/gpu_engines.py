"""Build, compare and time TensorRT engines of exported graphs on a GPU machine. No torch: numpy, onnxruntime, polygraphy, tensorrt, pycuda.

    python .ci/gpu_engines.py demo=DIR:INPUTS.npz demo_int8=DIR:INPUTS.npz --out $OUT/engines.json --budget 540

A job is NAME=FOLDER:INPUTS[:PRECISIONS][:REFERENCE]
  FOLDER      exported graphs with spec.json
  INPUTS      an .npz: images uint8 [N,H,W,3] of the network's size with img_aug_matrix (or original ones without), points, calibration
  PRECISIONS  with commas between, of fp32, fp16, int8 joined by '+'; by default fp16 for an FP32 folder, fp16+int8 for one with Q/DQ
  REFERENCE   a second folder whose ONNX Runtime outputs are the reference too (an INT8 folder against its FP32 one)

All engines are built first, --parallel at a time and each in a process of its own; then, with nothing else on the GPU, each job is run, compared and timed
in one more process with the time that is left. A crash or an endless build loses that engine or that job's rest and nothing else.
Every step is written at once; the parent joins what there is into one JSON, and writes a short one beside it, which the repository keeps.
"""
import os
os.environ.setdefault('CUDA_MODULE_LOADING', 'LAZY')
import argparse, json, os, platform, subprocess, sys, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

def now(): return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())

def put(path, obj):
    tmp = Path(f'{path}.part')
    tmp.write_text(json.dumps(obj, indent=1, default=str))
    os.replace(tmp, path)

def stats(ms):
    import numpy as np
    a = np.asarray(ms, float)
    p = np.percentile(a, [1, 50, 90, 95, 99])
    return dict(runs=len(a), mean_ms=a.mean(), std_ms=a.std(), min_ms=a.min(), p1_ms=p[0], median_ms=p[1], p90_ms=p[2], p95_ms=p[3], p99_ms=p[4], max_ms=a.max())

def hardware():
    "What this was measured on."
    from importlib.metadata import version, PackageNotFoundError
    res = dict(date=now(), python=platform.python_version(), system=platform.platform(), cores=len(os.sched_getaffinity(0)), versions={})
    for p in ('numpy', 'onnx', 'onnxruntime', 'polygraphy', 'tensorrt', 'pycuda'):
        try: res['versions'][p] = version(p)
        except PackageNotFoundError:
            try: res['versions'][p] = getattr(__import__(p), '__version__', None) or getattr(__import__(p), 'VERSION_TEXT', None)
            except Exception as e: res['versions'][p] = f'not to be had: {type(e).__name__}: {e}'
    try: res['cpu'] = next(l.split(':', 1)[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except Exception: pass
    try:
        keys = 'name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode'
        out = subprocess.run(['nvidia-smi', f'--query-gpu={keys}', '--format=csv,noheader'], capture_output=True, text=True, timeout=20, env={k:v for k,v in os.environ.items() if k not in ('LD_PRELOAD', 'LD_LIBRARY_PATH')}).stdout.splitlines()[0]
        res['gpu'] = dict(zip(keys.split(','), (o.strip() for o in out.split(','))))
    except Exception as e: res['gpu_note'] = f'nvidia-smi: {type(e).__name__}: {e}'
    try:
        import pycuda.driver as cuda
        cuda.init()
        d = cuda.Device(0)
        res['cuda'] = dict(name=d.name(), capability='.'.join(map(str, d.compute_capability())), memory_mib=d.total_memory()>>20, driver=cuda.get_driver_version(), built_for='.'.join(map(str, cuda.get_version())))
    except Exception as e: res['cuda_note'] = f'pycuda: {type(e).__name__}: {e}'
    return res

class Job:
    "One folder of graphs on one machine."
    def __init__(self, a):
        self.a, self.end, self.res = a, time.time()+a.seconds, dict(name=a.name, folder=Path(a.folder).name, inputs=Path(a.inputs or '').name, started=now(), steps={}, errors={})
        self.work = Path(a.work)/a.name
        self.work.mkdir(parents=True, exist_ok=True)

    def left(self): return self.end-time.time()

    def step(self, name, f, least=0.):
        "Run a step; its result, its seconds or why there is none."
        if self.left() < least:
            self.res['errors'][name] = f'skipped: {self.left():.0f} s left, {least:.0f} wanted'
            put(self.a.part, self.res)
            return None
        start, value = time.time(), None
        try: value = f()
        except Exception as e:
            self.res['errors'][name] = f'{type(e).__name__}: {e}'
            if type(e).__name__ != 'InputError': self.res['errors'][f'{name}.trace'] = traceback.format_exc().splitlines()[-12:]
        self.res['steps'][name] = round(time.time()-start, 2)
        print(f"[{self.a.name}] {name}: {time.time()-start:.1f} s{'' if name not in self.res['errors'] else ' FAILED '+self.res['errors'][name][:300]}", flush=True)
        put(self.a.part, self.res)
        return value

    def run(self):
        import numpy as np
        from bevorin.deploy.runtime import Detector, OnnxEngine, read_spec
        a, res = self.a, self.res
        self.spec = self.step('spec', lambda: read_spec(a.folder))
        if self.spec is None: return
        with np.load(a.inputs) as z: self.frame = {k:z[k] for k in z.files}
        res.update(target=self.spec.get('target'), precision=self.spec.get('precision'), graph_bytes={k:g['bytes'] for k,g in self.spec['graphs'].items()})
        aim = lambda d: d.calibrate(*(self.frame[k] for k in ('camera_intrinsics', 'camera2lidar', 'lidar2image')), self.frame.get('img_aug_matrix'), self.frame.get('lidar_aug_matrix')) if d.has_camera else d
        self.aim, self.shot = aim, (list(self.frame['images']) if 'images' in self.frame else None, self.frame.get('points'))
        self.ort = self.step('onnxruntime', lambda: self.open_ort(a.folder))
        self.fp32 = self.step('reference', lambda: self.open_ort(a.reference)) if a.reference else None
        if self.ort: res['rows'] = self.ort.counts
        res['level'] = a.level
        res['engines'] = {}
        for precision in a.precisions.split(','): self.variant(precision)

    def build(self, precision, k):
        "The record of an engine; built now, or when it was built before."
        from bevorin.deploy.engine import build_engine
        a, g, out = self.a, self.spec['graphs'][k], self.work/precision
        out.mkdir(exist_ok=True)
        free = {n for t in g['inputs'] for n in t['shape'] if isinstance(n, str)}
        return build_engine(Path(a.folder)/g['file'], out/f'{k}.plan', tuple(p for p in precision.split('+') if p != 'fp32'), {n:v for n,v in (self.spec.get('dynamic') or {}).items() if n in free},
                            timing_cache=Path(a.work)/'timing.cache', level=a.level, inputs={t['name']:t['shape'] for t in g['inputs']}, keep_fp32=g.get('keep_fp32', ()))

    def open_ort(self, folder):
        from bevorin.deploy.runtime import Detector
        det = self.aim(Detector(folder, 'onnxruntime', threads=len(os.sched_getaffinity(0))))
        det.infer(*self.shot)
        return det

    def variant(self, precision):
        from bevorin.deploy.engine import TensorrtEngine, record_of
        out, res, engines = self.work/precision, self.res['engines'].setdefault(precision, dict(build={}, graph_ms={})), {}
        for k,g in sorted(self.spec['graphs'].items(), key=lambda o: o[1]['bytes']):
            record = self.step(f'{precision}.build.{k}', lambda: self.build(precision, k)) if record_of(out/f'{k}.plan') else None
            if record is None:
                why = self.work/precision/f'{k}.error'
                self.res['errors'].setdefault(f'{precision}.build.{k}', why.read_text() if why.is_file() else 'not built within the time')
                continue
            res['build'][k] = {i:record.get(i) for i in ('seconds', 'bytes', 'builder', 'gpu', 'precision', 'layers', 'not_inspected', 'network_layers', 'device_bytes', 'warnings')}
            res['build'][k]['some_layers'] = self.some_layers(out/f'{k}.plan.layers.json')
            engine = self.step(f'{precision}.open.{k}', lambda: TensorrtEngine(out/f'{k}.plan'))
            if engine is None: continue
            engines[k] = engine
            res['graph_ms'][k] = self.step(f'{precision}.time.{k}', lambda: stats(engine.times(self.feeds(k), self.a.runs, self.a.warmup)), 5)
        res['in_tensorrt'] = sorted(engines)
        if engines and self.ort: self.use(precision, engines, res)
        for e in engines.values(): self.step(f'{precision}.close.{e.name}', e.close)

    def use(self, precision, engines, res):
        "Run the detector, compare, time."
        from bevorin.deploy.compare import compare
        from bevorin.deploy.runtime import Detector
        det = self.step(f'{precision}.detector', lambda: self.aim(Detector(self.a.folder, 'onnxruntime', threads=len(os.sched_getaffinity(0)), engines=engines)))
        if det is None: return
        found = self.step(f'{precision}.infer', lambda: det.infer(*self.shot))
        res['compare'] = self.step(f'{precision}.compare', lambda: compare(self.ort, det, [self.shot], self.a.min_score), 10)
        if self.fp32: res['compare_reference'] = self.step(f'{precision}.compare_reference', lambda: compare(self.fp32, det, [self.shot], self.a.min_score), 10)
        if found is not None: res['boxes'] = self.step(f'{precision}.boxes', lambda: self.boxes(found))
        if found is not None: res['frame_ms'] = self.step(f'{precision}.frames', lambda: self.frames(det), 5)

    def some_layers(self, path):
        "A few layers as the inspector tells them, to see its words."
        try: layers = json.loads(path.read_text())['layers']
        except Exception as e: return f'{type(e).__name__}: {e}'
        cut = lambda l: {k:(v if len(str(v)) < 300 else str(v)[:300]) for k,v in l.items()} if isinstance(l, dict) else str(l)[:300]
        return [cut(l) for l in layers[:2]+layers[len(layers)//2:len(layers)//2+1]]

    def feeds(self, k):
        "What the graph is fed in ONNX Runtime's frame; where that does not run, the same from the kernels, and noise for the fusion graph."
        import numpy as np
        from bevorin.deploy.kernels import depth_image
        from bevorin.deploy.runtime import check_points, lidar_feeds
        if not hasattr(self, 'trace'):
            self.trace = {}
            if self.ort: self.ort.infer(*self.shot, trace=self.trace)
        if k in self.trace: return self.trace[k]['feeds']
        points = check_points(self.frame['points'], (self.spec.get('voxelize') or {}).get('point_cloud_range'))
        if k == 'lidar': return lidar_feeds(points, self.spec, lambda part: None)
        if k == 'camera': return dict(images=self.frame['images'], depth=depth_image(points, self.frame['lidar2image'], self.frame['img_aug_matrix'], np.eye(4), tuple(self.spec['image']['size'])))
        rng = np.random.default_rng(0)
        return {t['name']:rng.standard_normal(t['shape']).astype(t['dtype']) for t in self.spec['graphs'][k]['inputs']}

    def boxes(self, found):
        "How far the boxes lie from ONNX Runtime's, proposal by proposal of the same class and nearest centre."
        import numpy as np
        res = {}
        for name,det in (('onnxruntime', self.ort), ('reference', self.fp32)):
            if det is None: continue
            ref = det.infer(*self.shot)
            if ref.bboxes is None: continue
            pairs = [(i, j) for i in np.flatnonzero(ref.scores >= self.a.min_score) for j in [min((j for j in range(len(found.labels)) if found.labels[j] == ref.labels[i]), key=lambda j: float(np.linalg.norm(found.bboxes[j,:2]-ref.bboxes[i,:2]))+abs(float(found.scores[j]-ref.scores[i])), default=None)] if j is not None]
            d = [np.linalg.norm(found.bboxes[j,:3]-ref.bboxes[i,:3]) for i,j in pairs]
            res[name] = dict(boxes=len(ref.scores), found=len(found.scores), compared=len(pairs), same_order=bool(len(ref.labels) == len(found.labels) and (ref.labels == found.labels).all()),
                             centre_max_m=float(max(d, default=0)), centre_median_m=float(np.median(d)) if d else 0., score_max=float(max((abs(found.scores[j]-ref.scores[i]) for i,j in pairs), default=0)))
            if ref.masks is not None: res[name].update(mask_max=float(np.abs(ref.masks-found.masks).max()), mask_flipped=float(((ref.masks > .5) != (found.masks > .5)).mean()))
        return res

    def frames(self, det):
        "The whole frame by part, host and device; fewer runs where time is short."
        from bevorin.deploy.runtime import Laps
        laps, start = [], time.time()
        det.infer(*self.shot)
        one = time.time()-start
        runs = max(5, min(self.a.runs, 40, int(.25*self.left()/one)))
        for _ in range(min(self.a.warmup, max(2, runs//10))): det.infer(*self.shot)
        for _ in range(runs):
            det.infer(*self.shot)
            laps.append(dict(det.seconds))
        return {k:stats([1e3*l[k] for l in laps]) for k in laps[0]}

def build_one(a):
    "Build one engine of a job; why not, beside it."
    from bevorin.deploy.runtime import read_spec
    job, precision = Job(a), a.precisions
    job.spec = read_spec(a.folder)
    try: job.build(precision, a.only)
    except Exception as e: (job.work/precision/f'{a.only}.error').write_text(f'{type(e).__name__}: {e}')

def build_all(a, jobs, end):
    "All engines, some at a time, the largest graphs first."
    todo, running, start = [], [], time.time()
    for name,folder,_,precisions,_ in jobs:
        sizes = {k:g['bytes'] for k,g in json.loads((Path(folder)/'spec.json').read_text())['graphs'].items()}
        todo += [(sizes[k], name, folder, p, k) for p in precisions.split(',') for k in sizes]
    todo.sort(key=lambda o: (o[4] == 'lidar', -o[0]))
    while (todo or running) and time.time() < end:
        for p,what,t in [r for r in running if r[0].poll() is not None]: print(f'built {what}: {time.time()-t:.0f} s', flush=True)
        running = [r for r in running if r[0].poll() is None]
        while todo and len(running) < a.parallel:
            _, name, folder, p, k = todo.pop(0)
            cmd = [sys.executable, __file__, '--only', k, '--name', name, '--folder', folder, '--precisions', p, '--seconds', str(end-time.time()), '--work', str(a.work)] + (['--level', str(a.level)] if a.level is not None else [])
            running.append((subprocess.Popen(cmd), f'{name} {p} {k}', time.time()))
        time.sleep(.5)
    for p,what,_ in running: p.kill(); p.wait(); print(f'stopped: {what}', flush=True)
    return round(time.time()-start, 1)

def child(a):
    job = Job(a)
    try: job.run()
    except Exception as e: job.res['errors']['job'] = f'{type(e).__name__}: {e}'; job.res['errors']['job.trace'] = traceback.format_exc().splitlines()[-12:]
    job.res['ended'] = now()
    put(a.part, job.res)

def parsed(text):
    "Name, folder, inputs, precisions and reference of a job."
    name, _, rest = text.partition('=')
    folder, inputs, precisions, reference = (rest.split(':')+['']*3)[:4]
    return name, folder, inputs, precisions or ('fp16+int8' if json.loads((Path(folder)/'spec.json').read_text()).get('precision') == 'int8' else 'fp16'), reference

def parent(a):
    end, out = time.time()+a.budget, Path(a.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(a.work)
    work.mkdir(parents=True, exist_ok=True)
    res = dict(format=1, what='TensorRT engines on a GPU: built, compared with ONNX Runtime, timed', settings=dict(runs=a.runs, warmup=a.warmup, budget_s=a.budget, level=a.level, min_score=a.min_score), jobs={})
    res['machine'] = json.loads(subprocess.run([sys.executable, __file__, '--hardware'], capture_output=True, text=True).stdout.strip().splitlines()[-1] or '{}')
    put(out, res)
    jobs = [parsed(text) for text in a.jobs]
    res['building'] = dict(at_a_time=a.parallel, seconds=build_all(a, jobs, time.time()+a.build_budget))
    put(out, res)
    for name,folder,inputs,precisions,reference in jobs:
        left = end-time.time()-5
        part = work/f'{name}.json'
        if left < 20: res['jobs'][name] = dict(error=f'skipped: {left:.0f} s left'); put(out, res); continue
        cmd = [sys.executable, __file__, '--child', '--name', name, '--folder', folder, '--inputs', inputs, '--precisions', precisions, '--reference', reference, '--seconds', str(left), '--part', str(part),
               '--work', str(work), '--runs', str(a.runs), '--warmup', str(a.warmup), '--min-score', str(a.min_score)] + (['--level', str(a.level)] if a.level is not None else [])
        start = time.time()
        try: code = subprocess.run(cmd, timeout=left+5).returncode
        except subprocess.TimeoutExpired: code = 'stopped: out of time'
        job = json.loads(part.read_text()) if part.is_file() else {}
        res['jobs'][name] = dict(job, status=code, seconds=round(time.time()-start, 1))
        put(out, res)
    put(out.with_name(f'{out.stem}_short.json'), short(res))
    summary(res)

_note = 'graph: inputs already on the GPU, one engine alone, by CUDA events; frame: with the NumPy kernels on the CPU and the copies between'

def short(res):
    "What is worth keeping."
    three = lambda v: {k:(round(o, 3) if isinstance(o, float) else o) for k,o in (v or {}).items() if k in ('median_ms', 'p95_ms', 'p99_ms', 'max_ms', 'runs')}
    def of(job):
        for precision,v in job['engines'].items():
            graphs = {k:dict(build_s=round(b['seconds']['build'], 1), bytes=b['bytes'], layers=(b['layers'] or {}).get('types'), **three(v['graph_ms'].get(k))) for k,b in v['build'].items()}
            noise = {c:{g:{o:r.get('sqnr_db') and round(r['sqnr_db'], 1) for o,r in part['outputs'].items() if 'sqnr_db' in r} for g,part in v[c]['graphs'].items()} for c in ('compare', 'compare_reference') if v.get(c)}
            yield dict(precision=precision, date=job['started'][:10], built_at_a_time=res['building']['at_a_time'], points=(job.get('rows') or {}).get('points'), graphs=graphs, in_tensorrt=v['in_tensorrt'],
                       frame_ms={k:three(t) for k,t in (v.get('frame_ms') or {}).items()}, sqnr_db=noise, boxes=v.get('boxes'), errors={k:str(e) for k,e in job['errors'].items() if not k.endswith('.trace')})
    m, s = res['machine'], res['settings']
    return dict(what='TensorRT engines on one GPU: built, run by Detector on one frame, compared with ONNX Runtime, timed', kind='measured', date=m['date'][:10], hardware={k:m['gpu'][k] for k in ('name', 'driver_version', 'memory.total', 'clocks.max.sm', 'power.limit')}, cpu=m.get('cpu'), cores=m['cores'],
                python=m['python'], versions=m['versions'], settings=s, note=_note, jobs={name if len(job['engines']) == 1 else f"{name}_{j['precision']}":j for name,job in res['jobs'].items() if job.get('engines') for j in of(job)},
                command='python .ci/gpu_engines.py '+' '.join([f'{n}=DIR:INPUTS.npz' for n in res['jobs']]+[f"--{k.removesuffix('_s').replace('_', '-')} {v:g}" for k,v in s.items() if isinstance(v, (int, float))]))

def summary(res):
    for name,job in res['jobs'].items():
        print(f"== {name}: status {job.get('status', job.get('error'))}, {job.get('seconds')} s, {len(job.get('errors') or {})} errors")
        for p,v in (job.get('engines') or {}).items():
            for k,b in v['build'].items(): print(f"   {p} {k}: build {b['seconds']['build']:.1f} s, {b['bytes']/1e6:.1f} MB, layers {(b['layers'] or {}).get('types')}; median {((v['graph_ms'].get(k) or {}).get('median_ms') or float('nan')):.3f} ms")
            if v.get('frame_ms'): print('   frame:', {k:round(s['median_ms'], 2) for k,s in v['frame_ms'].items()})
            for c in ('compare', 'compare_reference'):
                if v.get(c): print(f'   {c}:', {g:{o:(None if r.get('sqnr_db') is None else round(r['sqnr_db'], 1)) for o,r in part['outputs'].items() if 'sqnr_db' in r} for g,part in v[c]['graphs'].items()}, {g:part['proposals'] for g,part in v[c]['graphs'].items() if part.get('proposals')})
            if v.get('boxes'): print('   boxes:', v['boxes'])
        for k,e in (job.get('errors') or {}).items():
            if not k.endswith('.trace'): print(f'   ERROR {k}: {str(e)[:400]}')

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('jobs', nargs='*', help='NAME=FOLDER:INPUTS[:PRECISIONS][:REFERENCE]')
    ap.add_argument('--out', default='engines.json')
    ap.add_argument('--work', default='/tmp/engines', help='where engines and the timing cache are kept')
    ap.add_argument('--budget', type=float, default=540, help='seconds in all')
    ap.add_argument('--build-budget', type=float, default=400, dest='build_budget', help='of these for building')
    ap.add_argument('--parallel', type=int, default=6, help='engines built at a time')
    ap.add_argument('--runs', type=int, default=200)
    ap.add_argument('--warmup', type=int, default=20)
    ap.add_argument('--level', type=int, default=2, help='optimisation level of the builder; at 3, its own default, the demo took 98 s (camera) and 168 s (fusion) on an H200')
    ap.add_argument('--min-score', type=float, default=.1, dest='min_score')
    for k in ('hardware', 'child'): ap.add_argument(f'--{k}', action='store_true', help=argparse.SUPPRESS)
    for k in ('name', 'folder', 'inputs', 'precisions', 'reference', 'part', 'only'): ap.add_argument(f'--{k}', help=argparse.SUPPRESS)
    ap.add_argument('--seconds', type=float, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.hardware: print(json.dumps(hardware(), default=str))
    elif a.only: build_one(a)
    elif a.child: child(a)
    elif not a.jobs: ap.error('give at least one job')
    else: parent(a)

if __name__ == '__main__': main()
