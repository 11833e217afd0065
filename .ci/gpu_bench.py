"""`bench` and `monitor` on a GPU machine with TensorRT: times of a frame and of each engine alone, watts of the GPU by NVML. No torch: numpy, tensorrt, pycuda (onnxruntime for what has no engine).

    python .ci/gpu_bench.py demo=GRAPHS:INPUTS.npz --seconds 4 --out bench.json                   builds the engines first
    python .ci/gpu_bench.py demo=GRAPHS:INPUTS.npz::PLANS demo_int8=… --seconds 4 --out bench.json   takes those that stand in PLANS

A job is NAME=FOLDER:INPUTS[:PRECISION][:PLANS]
  FOLDER      exported graphs with spec.json
  INPUTS      an .npz: images uint8 [N,H,W,3] of the network's size with img_aug_matrix (or original ones without), points, calibration
  PRECISION   of fp32, fp16, int8 joined by '+'; by default fp16 for an FP32 folder, fp16+int8 for one with Q/DQ
  PLANS       a folder with engines already built, and their records

Engines are built in a process each, all at a time; what is not done within --build-budget seconds is stopped, and that graph runs in ONNX Runtime (`in_tensorrt` says which do not).
Then, for each job: `bench` for --seconds, each engine alone for half of it, and `monitor` beside a running detector for --seconds, its CSV, /metrics and the GPU's own energy counter read.
The watts are those of the GPU's board: no power of a Jetson module. A step that fails leaves its reason, and the JSON is written after each job.
"""
import os
os.environ.setdefault('CUDA_MODULE_LOADING', 'LAZY')
import argparse, csv, json, subprocess, sys, threading, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'.ci')]

from gpu_precisions import hardware, now, options, put

NOTE = 'engines: inputs already on the GPU, one engine alone; frame: with the NumPy kernels on the CPU and the copies between; watts: the board of the GPU by NVML, no power of a module'

def build_all(a, jobs, end):
    "The missing engines, all at a time: {job: {graph: why it was not built}}."
    running, why = [], {name:{} for name,*_ in jobs}
    for name,folder,_,precision,plans in jobs:
        if plans or a.backend != 'tensorrt': continue
        for k in json.loads((Path(folder)/'spec.json').read_text())['graphs']:
            cmd = [sys.executable, __file__, '--only', k, '--name', name, '--folder', folder, '--precisions', precision, '--level', str(a.level), '--work', str(a.work)]
            running.append((subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), name, k))
    for p,name,k in running:
        try: out, _ = p.communicate(timeout=max(.1, end-time.time()))
        except subprocess.TimeoutExpired: p.kill(); p.communicate(); why[name][k] = 'not built within the time'; continue
        if p.returncode: why[name][k] = (out.strip().splitlines() or ['no reason given'])[-1]
    return why

def build_one(a):
    from bevorin.deploy.engine import build_engine
    from bevorin.deploy.runtime import read_spec
    spec, out = read_spec(a.folder), Path(a.work)/a.name/a.precisions
    out.mkdir(parents=True, exist_ok=True)
    build_engine(Path(a.folder)/spec['graphs'][a.only]['file'], out/f'{a.only}.plan', **options(spec, a.only, tuple(p for p in a.precisions.split('+') if p != 'fp32'), a.level, Path(a.work)/'timing.cache'))

def parsed(text):
    "Name, folder, inputs, precision and plans of a job."
    name, _, rest = text.partition('=')
    folder, inputs, precision, plans = (rest.split(':')+['']*3)[:4]
    return name, folder, inputs, precision or ('fp16+int8' if json.loads((Path(folder)/'spec.json').read_text()).get('precision') == 'int8' else 'fp16'), plans

class One:
    "One job, measured."
    def __init__(self, a, gpu, name, folder, inputs, precision, plans, why):
        self.a, self.gpu, self.folder, self.inputs, self.plans = a, gpu, folder, inputs, Path(plans or Path(a.work)/name/precision)
        self.res = dict(precision=precision, started=now(), seconds={}, errors={f'build.{k}':v for k,v in why.items()})

    def step(self, name, f):
        start = time.time()
        try: return f()
        except Exception as e: self.res['errors'][name] = f'{type(e).__name__}: {e}'
        finally: self.res['seconds'][name] = round(time.time()-start, 2)

    def open(self):
        import numpy as np
        from bevorin.deploy.runtime import Detector, read_spec
        with np.load(self.inputs) as z: frame = {k:z[k] for k in z.files}
        engines = {k:self.step(f'open.{k}', lambda: self.engine(k)) for k in read_spec(self.folder)['graphs']} if self.a.backend == 'tensorrt' else {}
        det = Detector(self.folder, 'onnxruntime', threads=len(os.sched_getaffinity(0)), engines={k:e for k,e in engines.items() if e is not None})
        if det.has_camera: det.calibrate(*(frame[k] for k in ('camera_intrinsics', 'camera2lidar', 'lidar2image')), frame.get('img_aug_matrix'), frame.get('lidar_aug_matrix'))
        self.res['in_tensorrt'] = sorted(k for k,e in det.engines.items() if e.about.get('backend') == 'tensorrt')
        self.shot = (list(frame['images']) if 'images' in frame else None, frame.get('points'))
        det.infer(*self.shot)
        return det

    def engine(self, k):
        from bevorin.deploy.engine import TensorrtEngine
        return TensorrtEngine(self.plans/f'{k}.plan')

    def run(self):
        self.det = self.step('open', self.open)
        if self.det is None: return self.res
        self.res['bench'] = self.step('bench', self.bench)
        self.res['monitor'] = self.step('monitor', self.monitor)
        self.step('close', self.det.close)
        return self.res

    def capture(self, ms):
        from bevorin.orin.power import Capture
        return Capture(ms, source=self.gpu) if self.gpu else None

    def bench(self):
        "The result of `bench` without its single times."
        from bevorin.orin.bench import bench
        b = bench(self.det, [self.shot], frames=10, warmup=5, deadline_ms=self.a.deadline, power=self.capture(20), idle_s=1. if self.gpu else 0., seconds=self.a.seconds, engine_s=self.a.seconds/2, progress=False)
        print(b, flush=True)
        return {k:v for k,v in b.items() if k not in ('frame_ms', 'parts_ms', 'versions')}

    def monitor(self):
        "A monitor in a thread while frames run here: its summary, and what its CSV, /metrics and the GPU's energy counter say."
        from bevorin.orin.monitor import Listen, Logged, Monitor
        if not self.gpu: raise RuntimeError('no NVML here')
        work = Path(self.a.work)
        work.mkdir(parents=True, exist_ok=True)
        log, lines = work/f'{os.getpid()}.csv', work/f'{os.getpid()}.jsonl'
        for p in (log, lines): p.unlink(missing_ok=True)
        try: import prometheus_client; port = 0
        except ImportError: port = None
        m, done, what = Monitor(Listen(100, source=self.gpu), frames=lines, csv=log, port=port, show=None), [], Logged(self.det, lines)
        t = threading.Thread(target=lambda: done.append(m.run()), daemon=True)
        t.start()
        while not m.meter.count and t.is_alive(): time.sleep(.01)
        begin, joule, n, scraped = time.perf_counter(), self.gpu.energy_j(), 0, None
        while time.perf_counter()-begin < self.a.seconds: what.infer(*self.shot); n += 1
        span, end = time.perf_counter()-begin, self.gpu.energy_j()
        if m.metrics: scraped = urllib.request.urlopen(m.metrics.url, timeout=5).read().decode()
        time.sleep(.3)
        m.stop()
        t.join(10)
        with log.open() as f: rows = list(csv.DictReader(f))
        for p in (log, lines): p.unlink(missing_ok=True)
        value = {k:float(v) for k,v in (l.rsplit(' ', 1) for l in (scraped or '').splitlines() if l and l[0] != '#')}
        return dict(done[0], loop=dict(frames=n, seconds=span, fps=n/span, energy_counter_j=None if None in (joule, end) else end-joule, power_by_counter_w=None if None in (joule, end) else (end-joule)/span),
                    csv_rows=len(rows), metrics={k:value.get(f'bevorin_{k}') for k in ('power_watts', 'frames_per_second', 'frame_p95_seconds', 'energy_joules_total', 'frames_total')} if scraped else 'prometheus_client is not installed here')

def measure(a, gpu):
    start, out = time.time(), Path(a.out)
    jobs = [parsed(text) for text in a.jobs]
    res = dict(format=1, what='bench and monitor on a GPU machine', kind='measured', date=now(), command='python .ci/gpu_bench.py '+' '.join([f"{n}=DIR:INPUTS.npz{f':{p}:PLANS' if d else ''}" for n,_,_,p,d in jobs]+[f'--seconds {a.seconds:g}', f'--level {a.level}', f'--backend {a.backend}']),
               settings=dict(seconds=a.seconds, level=a.level, deadline_ms=a.deadline, backend=a.backend), note=NOTE, power_of=gpu.of if gpu else None, machine=hardware(), jobs={})
    why = build_all(a, jobs, start+a.build_budget)
    res['build_seconds'] = round(time.time()-start, 1)
    for name,folder,inputs,precision,plans in jobs:
        res['jobs'][name] = One(a, gpu, name, folder, inputs, precision, plans, why[name]).run()
        res['seconds'] = round(time.time()-start, 1)
        put(out, res)
    summary(res)
    return res

def summary(res):
    for name,j in res['jobs'].items():
        b, m = j.get('bench') or {}, j.get('monitor') or {}
        print(f"== {name} ({j['precision']}), in TensorRT: {', '.join(j.get('in_tensorrt') or ['nothing'])}")
        for k,e in (b.get('engines') or {}).items(): print(f"   {k}: median {e['median_ms']:.3f} ms, P99 {e['p99_ms']:.3f}, {e['runs']} runs {e['how']}; "+(f"{e['power']['power_mean_w']:.0f} W, {e['power']['energy_per_frame_j']:.3f} J a run" if e['power'] else e['power_why']))
        if b: print(f"   frame: median {b['frame']['median_ms']:.2f} ms, P99 {b['frame']['p99_ms']:.2f}; "+(f"{b['power']['power_mean_w']:.0f} W ({b['power'].get('idle_w', float('nan')):.0f} idle), {b['power']['energy_per_frame_j']:.2f} J" if b['power'] else b['power_why']))
        if m: print(f"   monitor: {m['samples']} samples, {m['power_mean_w']} W mean, {(m['frames'] or {}).get('frames')} frames seen of {m['loop']['frames']}, {m['loop']['power_by_counter_w']} W by the counter, /metrics {m['metrics']}")
        for k,e in j['errors'].items(): print(f'   ERROR {k}: {str(e)[:300]}')
    print(f"{res['seconds']} s, {res['build_seconds']} of them building")

def arguments(argv):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('jobs', nargs='*', help='NAME=FOLDER:INPUTS[:PRECISION][:PLANS]')
    ap.add_argument('--out', default='bench.json')
    ap.add_argument('--work', default='/tmp/bench', help='where engines and the timing cache are kept')
    ap.add_argument('--seconds', type=float, default=4., help='for the frame and for the monitor; half of it for each engine')
    ap.add_argument('--build-budget', type=float, default=60., dest='build_budget', help='seconds for building')
    ap.add_argument('--level', type=int, default=0, help='optimisation level of the builder')
    ap.add_argument('--deadline', type=float, default=80., help='ms; slower frames are counted')
    ap.add_argument('--backend', choices=('tensorrt', 'onnxruntime'), default='tensorrt')
    for k in ('only', 'name', 'folder', 'precisions'): ap.add_argument(f'--{k}', help=argparse.SUPPRESS)
    a = ap.parse_args(argv)
    if not (a.only or a.jobs): ap.error('give at least one job')
    return a

def nvml():
    "The GPU by its driver; its library is looked for beside libcuda too. None, and why, where there is none."
    import ctypes
    from bevorin.core import InputError
    from bevorin.orin.power import Nvml
    try: return Nvml()
    except InputError as e: why = e
    try:
        import pycuda.driver as cuda
        cuda.init()
        path = next(l.split()[-1] for l in open('/proc/self/maps') if 'libcuda.so' in l)
        return Nvml(lib=ctypes.CDLL(str(Path(path).with_name('libnvidia-ml.so.1'))))
    except Exception as e: print(f'without power: {why}; beside libcuda: {type(e).__name__}: {e}', flush=True)

def main(argv=None, gpu=None):
    "`gpu`: an `Nvml` for a test; by default the driver's."
    a = arguments(argv)
    if a.only: return build_one(a)
    gpu = gpu or nvml()
    return measure(a, gpu)

if __name__ == '__main__': main()
