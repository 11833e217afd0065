"""Every precision of exported graphs on a GPU: TensorRT engines built, timed, run on frames, held against ONNX Runtime layer by layer. No torch on the GPU: numpy, onnx, onnxruntime, polygraphy, tensorrt, pycuda.

    python .ci/gpu_precisions.py pack  --config CFG --data NUSCENES --split val --every 8 --out frames                 (with torch, before)
    python .ci/gpu_precisions.py run   demo=FP32DIR:INT8DIR:frames --out $OUT/precisions.json --budget 540              (on the GPU)
    python .ci/gpu_precisions.py score --data NUSCENES --found $OUT/found --frames frames --out scores.json             (afterwards)

A job is NAME=FP32:INT8:FRAMES[:PRECISIONS]: a folder of FP32 graphs, the Q/DQ folder of the same model (may be empty), a folder of frames of `pack` or one .npz, and, with commas between,
of fp32, fp16, qdq (INT8 by Q/DQ), cache (INT8 by a calibration cache translated from the Q/DQ graph), calibrator (INT8 by TensorRT's own calibrator on the frames); by default all that the folders allow.
Every engine is a process of its own with a limit, so that a crash or an endless build loses that engine alone; why it failed is kept in its place, and the next begins. What is done is written at once, and
the same command goes on from it. Then, as far as time is left: layers of each INT8 and FP16 engine against ONNX Runtime, and before that two faults planted in the fusion and the
camera graph that must be named on the engines: one scale times 8, and a layer norm whose squares leave FP16.
--onnxruntime puts ONNX Runtime in TensorRT's place, to try the script without a GPU: nothing it writes is then a figure of an engine.
"""
import os
os.environ.setdefault('CUDA_MODULE_LOADING', 'LAZY')
import argparse, copy, json, subprocess, sys, time, traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_engines import hardware, now, put, stats

PRECISIONS = dict(fp32=(), fp16=('fp16',), qdq=('fp16', 'int8'), cache=('fp16', 'int8'), calibrator=('fp16', 'int8'))

def frames_of(path):
    "Frames as dicts: images, points, calibration, token."
    import numpy as np
    files = sorted(Path(path).glob('*.npz')) if Path(path).is_dir() else [Path(path)]
    for f in files:
        with np.load(f) as z: yield f.stem, {k:z[k] for k in z.files}

def aim(det, frame): return det.calibrate(*(frame[k] for k in ('camera_intrinsics', 'camera2lidar', 'lidar2image')), frame.get('img_aug_matrix'), frame.get('lidar_aug_matrix')) if det.has_camera else det
def shot(frame): return (list(frame['images']) if 'images' in frame else None), frame.get('points')

class Task:
    "One step of a job in a process of its own."
    def __init__(self, a):
        self.a, self.work = a, Path(a.work)/a.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.folder = Path(a.int8 if a.precision == 'qdq' else a.fp32)
        from bevorin.deploy.runtime import read_spec
        self.spec = read_spec(self.folder)

    def feeds(self, folder, limit):
        "What ONNX Runtime's frame gives each graph, for so many frames."
        from bevorin.deploy.runtime import Detector
        det, res = Detector(folder, 'onnxruntime'), {}
        for _, f in list(frames_of(self.a.frames))[:limit]:
            trace = {}
            aim(det, f).infer(*shot(f), trace=trace)
            for k, t in trace.items(): res.setdefault(k, []).append(t['feeds'])
        return res

    def options(self, k, graph=None):
        "Of `build_engine` for a graph of the folder."
        g = self.spec['graphs'][k]
        free = {n for t in g['inputs'] for n in t['shape'] if isinstance(n, str)}
        return dict(precision=PRECISIONS[self.a.precision], dynamic={n:v for n, v in (self.spec.get('dynamic') or {}).items() if n in free}, timing_cache=self.work/'timing.cache', level=self.a.level,
                    inputs={t['name']:t['shape'] for t in g['inputs']}, keep_fp32=g.get('keep_fp32', ()) if PRECISIONS[self.a.precision] else ())

    def opens(self, k):
        "Graph file -> engine, for marked graphs."
        if self.a.onnxruntime: return None
        from bevorin.deploy.layers import trt_opens
        (d := self.work/'marked'/self.a.precision).mkdir(parents=True, exist_ok=True)
        return trt_opens(d, **{**self.options(k), 'timing_cache':self.work/'timing.cache', 'calibration':None})

    def build(self, k):
        "Build one engine; its record."
        from bevorin.deploy.cache import translate_files
        from bevorin.deploy.engine import api, build_engine
        a, file, how = self.a, self.folder/self.spec['graphs'][k]['file'], self.options(k)
        out = self.work/a.precision
        out.mkdir(exist_ok=True)
        if a.precision == 'cache':
            made = translate_files(Path(a.int8)/self.spec['graphs'][k]['file'], out/k, version='8.6.0' if a.onnxruntime else api().version)
            file, how['calibration'] = made['graph'], made['cache']
        if a.precision == 'calibrator': how['calibration'] = self.feeds(a.fp32, a.calibrate)[k]
        if a.onnxruntime: return dict(file=str(file), seconds={}, bytes=Path(file).stat().st_size, calibrated='calibration' in how)
        r = build_engine(file, out/f'{k}.plan', **how)
        return {i:r.get(i) for i in ('plan', 'seconds', 'bytes', 'builder', 'gpu', 'precision', 'layers', 'not_inspected', 'device_bytes', 'warnings', 'cached')}

    def engines(self):
        "Graph -> engine, of those that were built."
        from bevorin.deploy.engine import TensorrtEngine
        from bevorin.deploy.runtime import OnnxEngine
        out = self.work/self.a.precision
        if self.a.onnxruntime: return {k:OnnxEngine(out/f'{k}.clean.onnx' if self.a.precision == 'cache' else self.folder/g['file']) for k, g in self.spec['graphs'].items()}
        return {k:TensorrtEngine(out/f'{k}.plan') for k in self.spec['graphs'] if (out/f'{k}.plan.json').is_file()}

    def measure(self):
        "Times by percentile, outputs against ONNX Runtime, detections and masks of every frame."
        import numpy as np
        from bevorin.deploy.compare import compare
        from bevorin.deploy.runtime import Detector
        a, engines, frames = self.a, self.engines(), list(frames_of(self.a.frames))
        if not engines: raise RuntimeError('no engine of this precision was built')
        ort, trace = aim(Detector(self.folder, 'onnxruntime'), frames[0][1]), {}
        ort.infer(*shot(frames[0][1]), trace=trace)
        res = dict(in_engine=sorted(engines), graph_ms={k:stats(e.times(trace[k]['feeds'], a.runs, a.warmup)) for k, e in engines.items() if hasattr(e, 'times')})
        det = aim(Detector(self.folder, 'onnxruntime', engines=engines), frames[0][1])
        for name, ref in (('against_own_graph', self.folder), ('against_fp32', a.fp32)): res[name] = compare(ort if Path(ref) == self.folder else aim(Detector(ref, 'onnxruntime'), frames[0][1]), det, [shot(frames[0][1])])
        found = Path(a.found)/a.name/a.precision
        found.mkdir(parents=True, exist_ok=True)
        ms = []
        for token, f in frames:
            start = time.perf_counter()
            d = aim(det, f).infer(*shot(f))
            ms.append(1e3*(time.perf_counter()-start))
            part = found/f'.{token}.npz'
            np.savez_compressed(part, **{k:np.asarray(v) for k, v in dict(boxes=d.bboxes, scores=d.scores, labels=d.labels, masks=None if d.masks is None else d.masks.astype(np.float16)).items() if v is not None})
            os.replace(part, found/f'{token}.npz')
        return dict(res, frames=len(frames), host_frame_ms=stats(ms[1:] or ms))

    def layers(self, k):
        "Layer by layer against the FP32 graph in ONNX Runtime; the page beside."
        from bevorin.deploy import layers as l
        from bevorin.deploy.dla import Net
        a, feeds = self.a, self.feeds(self.a.fp32, 1)[k]
        file = self.spec['graphs'][k]['file']
        ref, net = l.record(Path(a.fp32)/file, feeds, 1), Net(self.folder/file)
        res = l.compare_runs(ref, l.record(net, feeds, a.chunks, opens=self.opens(k)), net)
        out = Path(a.out).parent/f'{a.name}.{a.precision}.{k}'
        l.page(res, f'{out}.html', f'{a.name}, {a.precision}, {k}'); res.save(f'{out}.layers.json')
        return dict(findings=res.findings(), worst=[{i:r[i] for i in ('tensor', 'op', 'sqnr_db', 'added_db')} for r in res.worst(5)], tensors=len(res['rows']), compared=sum(r['compared'] for r in res['rows']), marked_sqnr_db=res['candidate']['marked_sqnr_db'], page=f'{out.name}.html')

    def wrong_scale(self):
        "One scale of the fusion graph times 8; what is named."
        import numpy as np
        from onnx import numpy_helper
        from bevorin.deploy import layers as l
        from bevorin.deploy.dla import Net
        file, feeds = self.spec['graphs']['fusion']['file'], self.feeds(self.a.fp32, 1)['fusion']
        net, ref = Net(self.folder/file), l.record(Path(self.a.fp32)/file, feeds, 1)
        loose = l.after_choice(net)
        tensor = next(t for t in list(net.scales)[1:] if t not in loose and t in ref.values and t not in net.inputs)
        m, values = copy.deepcopy(net.proto), {i.name:numpy_helper.to_array(i) for i in net.proto.graph.initializer}
        quantised = {n.output[0] for n in m.graph.node if n.op_type == 'QuantizeLinear' and net.real.get(n.input[0], n.input[0]) == tensor}
        for i, n in enumerate(n for n in m.graph.node if n.op_type in ('QuantizeLinear', 'DequantizeLinear') and {n.output[0], n.input[0]} & quantised):
            m.graph.initializer.append(numpy_helper.from_array(np.float32(values[n.input[1]]*8), f'spoilt{i}'))
            n.input[1] = f'spoilt{i}'
        wrong = Net(m, 'one wrong scale')
        res = l.compare_runs(ref, l.record(wrong, feeds, self.a.chunks, opens=self.opens('fusion')), wrong)
        f, fix = res.findings(), l.repair_int8(res, wrong, Path(self.a.fp32)/file, feeds, opens=self.opens('fusion')) if self.a.repair else None
        return dict(planted=tensor, factor=8, scale_named=[o['tensor'] for o in f if o['kind'] == 'scale'] == [tensor], jump=next((o['tensor'] for o in f if o['kind'] == 'jump'), None), readers=[o for n in wrong.readers.get(tensor, []) for o in n.outputs], findings=f, repair=fix)

    def overflow(self):
        "A layer norm in elementary operators, its input times 1000, in FP16: squares leave its range; what is named, and whether FP32 there repairs it."
        import numpy as np
        from onnx import helper, numpy_helper
        from bevorin.deploy import layers as l
        from bevorin.deploy.dla import Net
        net, feeds = Net(self.folder/self.spec['graphs']['camera']['file']), self.feeds(self.a.fp32, 1)['camera']
        norms = [n for n in net.nodes if n.op == 'LayerNormalization']
        if not norms: raise RuntimeError('no LayerNormalization in the camera graph: its target writes norms in elementary operators; give graphs of trt86')
        n, m = norms[len(norms)//2], copy.deepcopy(net.proto)
        k, opset, new = f'{n.name}/planted', m.opset_import[0].version, []
        keep = lambda name, v: (m.graph.initializer.append(numpy_helper.from_array(v, f'{k}/{name}')), f'{k}/{name}')[1]
        op = lambda kind, out, *ins, **kw: (new.append(helper.make_node(kind, list(ins), [out], name=out, **kw)), out)[1]
        axes = keep('axes', np.array([-1]))
        mean = lambda x, out: op('ReduceMean', out, x, axes) if opset >= 18 else op('ReduceMean', out, x, axes=[-1])
        x = op('Mul', f'{k}/x', n.proto.input[0], keep('scale', np.float32(1000)))
        d = op('Sub', f'{k}/d', x, mean(x, f'{k}/mean'))
        std = op('Sqrt', f'{k}/std', op('Add', f'{k}/eps', mean(op('Mul', f'{k}/square', d, d), f'{k}/var'), keep('epsilon', np.float32(1e-5))))
        op('Add', n.outputs[0], op('Mul', f'{k}/w', op('Div', f'{k}/unit', d, std), n.proto.input[1]), n.proto.input[2])
        rest = list(m.graph.node)
        del m.graph.node[:]
        m.graph.node.extend([*rest[:n.at], *new, *rest[n.at+1:]])
        over, ref = Net(m, 'a norm that overflows'), l.record(m, feeds, 1)
        res = l.compare_runs(ref, l.record(over, feeds, self.a.chunks, opens=self.opens('camera')), over)
        f, fix = res.findings(), None
        if self.a.repair and f and not self.a.onnxruntime:
            names, how = [t for t in l.ends(over) if t in l.depths(over)], self.options('camera')
            model = l.mark(over, names)
            folder = self.work/'marked'/self.a.precision
            run = lambda nodes: l.run_model(model, feeds, l.trt_opens(folder, **{**how, 'keep_fp32':(*how['keep_fp32'], *(f'{o}*' for o in nodes))}))[0]
            fix = l.repair(res, l.run_model(model, feeds)[0], names, run, 40., [*(o for o in dict.fromkeys(r['node'] for r in res['rows'] if r['tensor'].startswith(k)))])
        return dict(planted=n.name, factor=1000, found=any((o['tensor'] or '').startswith(n.name) for o in f), findings=f, repair=fix)

    def do(self):
        step, _, k = self.a.step.partition('.')
        return getattr(self, step)(*([k] if k else []))

def child(a):
    part, start = Path(a.part), time.time()
    try: res = dict(value=Task(a).do())
    except Exception as e: res = dict(error=f'{type(e).__name__}: {e}', trace=None if type(e).__name__ == 'InputError' else traceback.format_exc().splitlines()[-8:])
    put(part, dict(res, seconds=round(time.time()-start, 2)))

def jobs_of(a):
    for text in a.jobs:
        name, _, rest = text.partition('=')
        fp32, int8, frames, precisions = (rest.split(':')+['']*4)[:4]
        yield name, fp32, int8, frames, [p for p in (precisions.split(',') if precisions else PRECISIONS) if int8 or p not in ('qdq', 'cache')]

def steps(fp32, precisions, a):
    "In the order of what is worth most: engines and times of all, then layers, then faults."
    graphs = json.loads((Path(fp32)/'spec.json').read_text())['graphs']
    for p in precisions:
        for k in sorted(graphs, key=lambda k: graphs[k]['bytes']): yield p, f'build.{k}', a.build_limit
        yield p, 'measure', a.limit
    if 'qdq' in precisions and 'fusion' in graphs: yield 'qdq', 'wrong_scale', a.limit
    if 'fp16' in precisions and 'camera' in graphs: yield 'fp16', 'overflow', a.limit
    for p in precisions:
        if p in ('fp16', 'qdq'):
            for k in graphs: yield p, f'layers.{k}', a.limit

def run(a):
    "All steps of all jobs, each a process; what stands in the file is not done again."
    end, out, work = time.time()+a.budget, Path(a.out), Path(a.work)
    out.parent.mkdir(parents=True, exist_ok=True); work.mkdir(parents=True, exist_ok=True)
    a.found = a.found or str(out.parent/'found')
    try: res = json.loads(out.read_text())
    except (OSError, ValueError): res = dict(format=1, what='precisions of exported graphs on one GPU', kind='tried with ONNX Runtime' if a.onnxruntime else 'measured', settings=dict(runs=a.runs, warmup=a.warmup, level=a.level, chunks=a.chunks, calibration_frames=a.calibrate), machine=hardware(), jobs={})
    for name, fp32, int8, frames, precisions in jobs_of(a):
        job = res['jobs'].setdefault(name, dict(started=now(), fp32=Path(fp32).name, int8=Path(int8).name, steps={}))
        for p, step, limit in steps(fp32, precisions, a):
            key, left = f'{p}.{step}', end-time.time()-3
            if 'value' in job['steps'].get(key, {}): continue
            if left < 10: job['steps'][key] = dict(error=f'not begun: {left:.0f} s left'); continue
            part = work/f'{name}.{key}.json'
            part.unlink(missing_ok=True)
            cmd = [sys.executable, __file__, 'child', '--step', step, '--name', name, '--fp32', fp32, '--int8', int8, '--frames', frames, '--precision', p, '--part', str(part), '--work', str(work), '--found', a.found, '--out', str(out),
                   *(o for k in ('runs', 'warmup', 'level', 'chunks', 'calibrate') for o in (f'--{k}', str(getattr(a, k)))), *(['--repair'] if a.repair else []), *(['--onnxruntime'] if a.onnxruntime else [])]
            try: code = subprocess.run(cmd, timeout=min(left, limit)).returncode
            except subprocess.TimeoutExpired: code = f'stopped after {min(left, limit):.0f} s'
            job['steps'][key] = json.loads(part.read_text()) if part.is_file() else dict(error=f'ended without a word: {code}')
            s = job['steps'][key]
            print(f"[{name}] {key}: "+(f"FAILED {s['error'][:200]}" if 'error' in s else f"{s['seconds']} s"), flush=True)
            put(out, res)
        put(out, res)
    bad = {f'{n}.{k}':s['error'] for n, j in res['jobs'].items() for k, s in j['steps'].items() if 'error' in s}
    print(f"{sum('value' in s for j in res['jobs'].values() for s in j['steps'].values())} steps done, {len(bad)} failed or left"+''.join(f'\n  {k}: {e[:300]}' for k, e in bad.items()))

def pack(a):
    "Frames of a dataset as .npz, images in the network's size."
    import numpy as np
    from bevorin.config import load_config
    from bevorin.data.nuscenes import NuScenesDataset, open_nuscenes
    from bevorin.pipeline import image_bytes
    cfg, out = load_config(a.config), Path(a.out)
    data = NuScenesDataset(cfg, a.data, a.split, sweeps=a.sweeps, nusc=open_nuscenes(a.data))
    out.mkdir(parents=True, exist_ok=True)
    for i in range(0, len(data), a.every):
        s = data[i]
        np.savez_compressed(out/f"{s['token']}.npz", images=image_bytes(s['images']), **{k:np.asarray(s[k]) for k in ('points', 'camera_intrinsics', 'camera2lidar', 'lidar2image', 'img_aug_matrix')})
    print(f'{out}: {len(range(0, len(data), a.every))} frames')

def score(a):
    "mAP, NDS and mIoU of what the engines found, by the evaluation of bevorin eval."
    import numpy as np
    from bevorin.config import load_config
    from bevorin.data.nuscenes import make_loader, open_nuscenes
    from bevorin.train.evaluate import evaluate
    nusc, res = open_nuscenes(a.data), {}
    for folder in sorted(p for p in Path(a.found).glob('*/*') if p.is_dir()):
        have = {f.stem for f in folder.glob('*.npz')}
        def predict(batch):
            def one(token):
                with np.load(folder/f'{token}.npz') as z: return {k:z[k].astype(np.float32) if k == 'masks' else z[k] for k in z.files}
            return [one(t) for t in batch['token']]
        loader = make_loader(load_config(a.config), a.data, a.split, workers=0, sweeps=a.sweeps, nusc=nusc)
        loader.dataset.order = np.array([i for i in loader.dataset.order if loader.dataset.samples[i].token in have], int)
        res[f'{folder.parent.name}.{folder.name}'] = dict(evaluate(predict, loader, nusc, split=sorted(have), progress=False).headline, frames=len(have))
        print(folder, res[f'{folder.parent.name}.{folder.name}'], flush=True)
    put(a.out, res)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=('pack', 'run', 'score', 'child'))
    ap.add_argument('jobs', nargs='*', help='NAME=FP32:INT8:FRAMES[:PRECISIONS]')
    for k in ('config', 'data', 'found', 'frames', 'step', 'name', 'fp32', 'int8', 'precision', 'part'): ap.add_argument(f'--{k}')
    ap.add_argument('--split', default='val'); ap.add_argument('--every', type=int, default=1); ap.add_argument('--sweeps', type=int, default=9)
    ap.add_argument('--out', default='precisions.json'); ap.add_argument('--work', default='/tmp/precisions')
    ap.add_argument('--budget', type=float, default=540, help='seconds in all'); ap.add_argument('--limit', type=float, default=200, help='of one measurement'); ap.add_argument('--build-limit', type=float, default=200, dest='build_limit', help='of one build')
    ap.add_argument('--runs', type=int, default=200); ap.add_argument('--warmup', type=int, default=20); ap.add_argument('--level', type=int, default=2); ap.add_argument('--chunks', type=int, default=3); ap.add_argument('--calibrate', type=int, default=4, help='frames')
    for k in ('repair', 'onnxruntime'): ap.add_argument(f'--{k}', action='store_true')
    a = ap.parse_args()
    if a.what == 'run' and not a.jobs: ap.error('give at least one job')
    dict(pack=pack, run=run, score=score, child=child)[a.what](a)

if __name__ == '__main__': main()
