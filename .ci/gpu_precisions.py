"""Every precision of exported graphs on a GPU: TensorRT engines built, timed, run on frames, held against ONNX Runtime layer by layer. No torch on the GPU: numpy, onnx, onnxruntime, polygraphy, tensorrt, pycuda.

    python .ci/gpu_precisions.py pack  --config CFG --data NUSCENES --split val --every 8 --out frames                 (with torch, before)
    python .ci/gpu_precisions.py run   demo=FP32DIR:INT8DIR:frames --out $OUT/precisions.json --budget 540              (on the GPU)
    python .ci/gpu_precisions.py score --config CFG --data NUSCENES --split val --found found --short precisions_short.json --out scores.json   (with torch, afterwards)

A job is NAME=FP32:INT8:FRAMES[:PRECISIONS]: a folder of FP32 graphs, the Q/DQ folder of the same model (may be empty), a folder of frames of `pack` or one .npz, and, with commas between,
of fp32, fp16, qdq (INT8 by Q/DQ), cache (INT8 by a calibration cache translated from the Q/DQ graph), calibrator (INT8 by TensorRT's own calibrator on the frames); by default all that the folders allow.
Every step is a process of its own with a limit, so that a crash or an endless build loses that engine alone; why it failed is kept in its place. What is done is written at once, and the same command goes on
from it. Four rounds: inputs of the graphs from ONNX Runtime; all engines, --at-once of them on each GPU (start CUDA's multi-process service before, and they do not wait for each other); times, by one process
alone on its GPU, with the kernels that were launched; then accuracy on all frames, two faults planted in the fusion and the camera graph that must be named on the engines (one scale times 8, and a layer norm
whose squares leave FP16), and the layers of each FP16 and Q/DQ engine against ONNX Runtime.
--refit builds each FP16 and Q/DQ engine once more, its weights replaceable, and replaces them.
--onnxruntime puts ONNX Runtime in TensorRT's place, to try the script without a GPU: nothing it writes is then a figure of an engine.
"""
import os
os.environ.setdefault('CUDA_MODULE_LOADING', 'LAZY')
import argparse, copy, gzip, json, platform, re, subprocess, sys, time, traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

THRESHOLDS = (.35, .40, .45, .50, .55, .60, .65)    # of bevorin.train.metrics, which needs torch
PRECISIONS = dict(fp32=(), fp16=('fp16',), qdq=('fp16', 'int8'), cache=('fp16', 'int8'), calibrator=('fp16', 'int8'))

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

def options(spec, k, precision, level, timing_cache):
    "Of `build_engine` for a graph of an exported folder; a level below 0 is the builder's own."
    g = spec['graphs'][k]
    free = {n for t in g['inputs'] for n in t['shape'] if isinstance(n, str)}
    return dict(precision=precision, dynamic={n:v for n, v in (spec.get('dynamic') or {}).items() if n in free}, timing_cache=timing_cache, level=None if level < 0 else level,
                inputs={t['name']:t['shape'] for t in g['inputs']}, keep_fp32=g.get('keep_fp32', ()) if precision else ())

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

    def prepare(self):
        "What ONNX Runtime's frame gives each graph, kept."
        import numpy as np
        from bevorin.deploy.runtime import Detector
        det, n = Detector(self.a.fp32, 'onnxruntime'), 0
        for _, f in list(frames_of(self.a.frames))[:self.a.calibrate]:
            trace = {}
            aim(det, f).infer(*shot(f), trace=trace)
            for k, t in trace.items():
                with open(self.work/'.part', 'wb') as o: np.savez(o, **t['feeds'])
                os.replace(self.work/'.part', self.work/f'feeds.{k}.{n}.npz')
            n += 1
        return dict(frames=n, rows=det.counts)

    def feeds(self, k, limit=None):
        "The inputs of a graph, of so many frames."
        import numpy as np
        res = []
        for f in sorted(self.work.glob(f'feeds.{k}.*.npz'))[:limit]:
            with np.load(f) as z: res.append({n:z[n] for n in z.files})
        if not res: raise RuntimeError(f'no inputs of {k}: the step prepare failed')
        return res

    def options(self, k): return options(self.spec, k, PRECISIONS[self.a.precision], self.a.level, self.work/'timing.cache')

    @property
    def chunks(self): return self.a.chunks or (3 if self.a.onnxruntime else 0)

    def opens(self, k, **how):
        "Graph file -> engine, for marked graphs."
        if self.a.onnxruntime: return None
        from bevorin.deploy.layers import trt_opens
        (d := self.work/'marked'/f'{self.a.precision}.{self.a.step}').mkdir(parents=True, exist_ok=True)
        return trt_opens(d, **self.options(k), **how)

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
        if a.precision == 'calibrator': how['calibration'] = self.feeds(k)
        if a.onnxruntime: return dict(file=str(file), seconds={}, bytes=Path(file).stat().st_size, calibrated='calibration' in how)
        r = build_engine(file, out/f'{k}.plan', **how)
        return {i:r.get(i) for i in ('plan', 'seconds', 'bytes', 'builder', 'gpu', 'precision', 'layers', 'not_inspected', 'device_bytes', 'warnings', 'cached')}

    def engines(self):
        "Graph -> engine, of those that were built."
        from bevorin.deploy.engine import TensorrtEngine
        from bevorin.deploy.runtime import OnnxEngine
        out = self.work/self.a.precision
        if self.a.onnxruntime: return {k:OnnxEngine(f) for k, g in self.spec['graphs'].items() for f in [out/f'{k}.clean.onnx' if self.a.precision == 'cache' else self.folder/g['file']] if f.is_file()}
        return {k:TensorrtEngine(out/f'{k}.plan') for k in self.spec['graphs'] if (out/f'{k}.plan.json').is_file()}

    def measure(self):
        "Outputs against ONNX Runtime, detections and masks of every frame."
        import numpy as np
        from bevorin.deploy.compare import compare
        from bevorin.deploy.runtime import Detector
        a, engines, frames = self.a, self.engines(), list(frames_of(self.a.frames))
        if not engines: raise RuntimeError('no engine of this precision was built')
        ort, res = aim(Detector(self.folder, 'onnxruntime'), frames[0][1]), dict(in_engine=sorted(engines))
        det = aim(Detector(self.folder, 'onnxruntime', engines=engines), frames[0][1])
        for name, ref in (('against_own_graph', self.folder), ('against_fp32', a.fp32)): res[name] = compare(ort if Path(ref) == self.folder else aim(Detector(ref, 'onnxruntime'), frames[0][1]), det, [shot(frames[0][1])])
        found = Path(a.found)/a.name/a.precision
        found.mkdir(parents=True, exist_ok=True)
        for token, f in frames if len(frames) > 1 else ():
            d = aim(det, f).infer(*shot(f))
            part = found/f'.{token}.npz'
            passed = None if d.masks is None else sum((d.masks >= t).astype(np.uint8) for t in THRESHOLDS)    # all that the metric asks of a mask
            np.savez_compressed(part, **{k:np.asarray(v) for k, v in dict(boxes=d.bboxes, scores=d.scores, labels=d.labels, passed=passed).items() if v is not None})
            os.replace(part, found/f'{token}.npz')
        return dict(res, frames=len(frames))

    def times(self):
        "Milliseconds of every engine, alone on the GPU, by percentile; then what the profiler and CUPTI say of layers and kernels."
        from bevorin.deploy.inspect import kernels, time_layers
        res = {}
        for k, e in self.engines().items():
            if not hasattr(e, 'times'): continue
            feeds, plan = self.feeds(k, 1)[0], self.work/self.a.precision/f'{k}.plan'
            res[k] = stats(e.times(feeds, self.a.runs, self.a.warmup))
            try: put(f'{plan}.kernels.json', kernels(e, feeds))
            except Exception as x: res[k]['no_kernels'] = str(x)
            e.close()
            try: time_layers(plan, feeds)
            except Exception as x: res[k]['no_layer_times'] = str(x)
        return res

    def int8(self):
        "Which of the layers that the Q/DQ graph quantises ran in INT8, and why the others did not."
        from bevorin.deploy.inspect import inspect, int8_layers
        out, res = self.work/self.a.precision, {}
        for k, g in self.spec['graphs'].items():
            if not (out/f'{k}.plan.json').is_file(): continue
            told = Path(f'{out/k}.plan.kernels.json')
            res[k] = int8_layers(self.folder/g['file'], inspect(out/f'{k}.plan'), json.loads(told.read_text()) if told.is_file() else None)
        return res

    def pieces(self):
        "What of the Q/DQ fusion graph fits a DLA, each piece as Q/DQ, as clean graph with cache and as clean graph calibrated on frames: engines of the GPU against the first and against ONNX Runtime."
        from bevorin.deploy.compare import Errors
        from bevorin.deploy.engine import TensorrtEngine, api, build_engine
        from bevorin.deploy.place import dla_files
        from bevorin.deploy.runtime import OnnxEngine
        folder, a, res = self.work/'pieces', self.a, []
        dla_files(self.folder/self.spec['graphs']['fusion']['file'], out=folder, by=dict(dla0=['fuser*', 'decoder*', 'map*']))
        frames = [dict(f) for f in self.feeds('fusion')]
        noise = lambda x, y: {k:Errors().add(x[k], y[k]).row().get('sqnr_db') for k in y}
        for p in json.loads((folder/'plan.json').read_text())['pieces']:
            with OnnxEngine(folder/p['file']) as e:
                feeds = [{k:f[k] for k in e.inputs} for f in frames]
                for f, x in zip(frames, feeds): f.update(e.run(x))
            if 'clean' not in p: continue
            row, out = dict(file=p['file'], device=p['device'], nodes=len(p['nodes']), int8_tensors=p['int8_tensors']), {}
            for name, file, how in (('qdq', p['file'], {}), ('cache', p['clean'], dict(calibration=folder/p['cache'])), ('calibrator', p['clean'], dict(calibration=feeds))):
                plan = folder/f'{name}.{p["file"]}.plan'
                if a.onnxruntime: e = OnnxEngine(folder/file)
                else: row[name], e = {k:build_engine(folder/file, plan, ('fp16', 'int8'), timing_cache=self.work/'timing.cache', level=None if a.level < 0 else a.level, **how)[k] for k in ('bytes', 'layers', 'seconds')}, TensorrtEngine(plan)
                with e: out[name] = e.run(feeds[0])
            res.append(dict(row, **{f'{k}_against_qdq':noise(out['qdq'], out[k]) for k in ('cache', 'calibrator')}, **{f'{k}_against_onnxruntime':noise(frames[0], out[k]) for k in out}))
        return res

    def layers(self, k):
        "Layer by layer against the FP32 graph in ONNX Runtime; the page beside."
        from bevorin.deploy import layers as l
        from bevorin.deploy.dla import Net
        a, feeds = self.a, self.feeds(k, 1)
        file = self.spec['graphs'][k]['file']
        ref, net = l.record(Path(a.fp32)/file, feeds, 1), Net(self.folder/file)
        res = l.compare_runs(ref, l.record(net, feeds, self.chunks, opens=self.opens(k)), net)
        out = Path(a.out).parent/f'{a.name}.{a.precision}.{k}'
        l.page(res, f'{out}.html', f'{a.name}, {a.precision}, {k}'); res.save(f'{out}.layers.json')
        return dict(findings=res.findings(), worst=[{i:r[i] for i in ('tensor', 'op', 'sqnr_db', 'added_db')} for r in res.worst(5)], tensors=len(res['rows']), compared=sum(r['compared'] for r in res['rows']), marked_sqnr_db=res['candidate']['marked_sqnr_db'], page=f'{out.name}.html')

    def wrong_scale(self):
        "One scale of the fusion graph times 8, or an eighth; what is named."
        import numpy as np
        from onnx import numpy_helper
        from bevorin.deploy import layers as l
        from bevorin.deploy.dla import Net
        file, feeds = self.spec['graphs']['fusion']['file'], self.feeds('fusion', 1)
        net, ref = Net(self.folder/file), l.record(Path(self.a.fp32)/file, feeds, 1)
        loose = l.after_choice(net)
        tensor = next(t for t in list(net.scales)[1:] if t not in loose and t in ref.values and t not in net.inputs)
        m, values = copy.deepcopy(net.proto), {i.name:numpy_helper.to_array(i) for i in net.proto.graph.initializer}
        left = lambda f: l._quantised_sqnr(ref.values[tensor], float(net.scales[tensor][0])*f)
        factor = 8 if left(8) < left(1)-9 else 1/8    # where a scale is too narrow, 8 times may be no fault
        quantised = {n.output[0] for n in m.graph.node if n.op_type == 'QuantizeLinear' and net.real.get(n.input[0], n.input[0]) == tensor}
        for i, n in enumerate(n for n in m.graph.node if n.op_type in ('QuantizeLinear', 'DequantizeLinear') and {n.output[0], n.input[0]} & quantised):
            m.graph.initializer.append(numpy_helper.from_array(np.float32(values[n.input[1]]*factor), f'spoilt{i}'))
            n.input[1] = f'spoilt{i}'
        wrong = Net(m, 'one wrong scale')
        res = l.compare_runs(ref, l.record(wrong, feeds, self.chunks, opens=self.opens('fusion')), wrong)
        f, fix = res.findings(), l.repair_int8(res, wrong, Path(self.a.fp32)/file, feeds, opens=self.opens('fusion')) if self.a.repair else None
        return dict(planted=tensor, factor=factor, scale_named=[o['tensor'] for o in f if o['kind'] == 'scale'] == [tensor], jump=next((o['tensor'] for o in f if o['kind'] == 'jump'), None), readers=[o for n in wrong.readers.get(tensor, []) for o in n.outputs], findings=f, repair=fix)

    def overflow(self):
        "A layer norm by hand, its variance in one pass, its input times 1,000, held in FP16: squares leave its range; what is named, and whether FP32 there repairs it. (TensorRT 8.6 knows the usual two passes: planted so, nothing overflowed.)"
        import numpy as np
        from onnx import helper, numpy_helper
        from bevorin.deploy import layers as l
        from bevorin.deploy.dla import Net
        from bevorin.deploy.inspect import inspect
        net, feeds = Net(self.folder/self.spec['graphs']['camera']['file']), self.feeds('camera', 1)
        norms = [n for n in net.nodes if n.op == 'LayerNormalization']
        if not norms: raise RuntimeError('no LayerNormalization in the camera graph: its target writes norms in elementary operators; give graphs of trt86')
        if not self.a.onnxruntime and not (self.work/self.a.precision/'camera.plan.json').is_file(): self.build('camera')
        kept = set() if self.a.onnxruntime else set(inspect(self.work/self.a.precision/'camera.plan').keeps)
        norms = [n for n in norms if n.outputs[0] in kept] or norms
        n, m, new = norms[len(norms)//2], copy.deepcopy(net.proto), []
        k = f'{n.name}/planted'
        keep = lambda name, v: (m.graph.initializer.append(numpy_helper.from_array(v, f'{k}/{name}')), f'{k}/{name}')[1]
        op = lambda kind, out, *ins, **kw: (new.append(helper.make_node(kind, list(ins), [out], name=f'{k}/{kind}{len(new)}', **kw)), out)[1]
        axes, old = keep('axes', np.array([-1])), m.opset_import[0].version < 18
        mean = lambda x, out: op('ReduceMean', out, x, axes=[-1]) if old else op('ReduceMean', out, x, axes)
        x = op('Mul', f'{k}/x', n.proto.input[0], keep('scale', np.float32(1000)))
        m1 = mean(x, f'{k}/mean')
        var = op('Sub', f'{k}/var', mean(op('Mul', f'{k}/square', x, x), f'{k}/mean_of_squares'), op('Mul', f'{k}/square_of_mean', m1, m1))
        d, std = op('Sub', f'{k}/d', x, m1), op('Sqrt', f'{k}/std', op('Add', f'{k}/eps', var, keep('epsilon', np.float32(1e-5))))
        op('Add', n.outputs[0], op('Mul', f'{k}/w', op('Div', f'{k}/unit', d, std), n.proto.input[1]), n.proto.input[2])
        rest = list(m.graph.node)
        del m.graph.node[:]
        m.graph.node.extend([*rest[:n.at], *new, *rest[n.at+1:]])
        opens = lambda hold: self.opens('camera', layers={f'{k}/*':hold})
        over, ref = Net(m, 'a norm that overflows'), l.record(m, feeds, 1)
        res = l.compare_runs(ref, l.record(over, feeds, self.chunks, opens=opens('fp16')), over)
        f, names = res.findings(), [t for t in l.ends(over) if t in l.depths(over)]
        l.page(res, Path(self.a.out).parent/f'{self.a.name}.overflow.html', f'{self.a.name}: a norm that overflows')
        fix = l.repair(res, l.run_model(l.mark(net, names), feeds)[0], names, lambda nodes: l.run_model(l.mark(over, names), feeds, opens('fp32' if nodes else 'fp16'))[0], 40., [k])
        return dict(planted=n.name, factor=1000, found=any((o['tensor'] or '').startswith(n.name) for o in f), findings=f, repair=fix)

    def refit(self, k):
        "Built so that weights can be replaced, and replaced by others (every array of 256 values and more, 5 % of noise): seconds, and outputs against ONNX Runtime with the new weights, of the new and of the old engine."
        import numpy as np, onnx
        from onnx import numpy_helper
        from bevorin.deploy.compare import Errors
        from bevorin.deploy.engine import TensorrtEngine, build_engine, refit_engine
        from bevorin.deploy.runtime import OnnxEngine
        if self.a.onnxruntime: raise RuntimeError('ONNX Runtime has no engines to refit')
        (out := self.work/'refit').mkdir(exist_ok=True)
        file, rng = self.folder/self.spec['graphs'][k]['file'], np.random.default_rng(0)
        m = onnx.load(str(file))
        for i in m.graph.initializer:
            x = numpy_helper.to_array(i)
            if i.data_type == 1 and x.ndim > 1 and x.size >= 256: i.CopyFrom(numpy_helper.from_array((x*(1+.05*rng.standard_normal(x.shape))).astype(np.float32), i.name))
        onnx.save(m, str(out/f'{k}.onnx'))
        old = build_engine(file, out/f'{k}.old.plan', refit=True, **self.options(k))
        new = refit_engine(out/f'{k}.old.plan', out/f'{k}.onnx', out/f'{k}.plan')
        feeds, res = self.feeds(k, 1)[0], dict(build_s=old['seconds']['build'], refit_s=new['seconds']['refit'], weights=len(new['onnx']['weights']), replaced=new['replaced']['weights'])
        with OnnxEngine(out/f'{k}.onnx') as e: ref = e.run(feeds)
        for name, plan in (('new', f'{k}.plan'), ('old', f'{k}.old.plan')):
            with TensorrtEngine(out/plan) as e: got = e.run(feeds)
            res[f'{name}_sqnr_db'] = {o:Errors().add(ref[o], got[o]).row().get('sqnr_db') for o in ref}
        return res

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
    "(round, precision, step, limit), in the order of what is worth most."
    graphs = json.loads((Path(fp32)/'spec.json').read_text())['graphs']
    yield 0, precisions[0], 'prepare', a.limit
    for p in precisions:
        for k in sorted(graphs, key=lambda k: -graphs[k]['bytes']): yield 1, p, f'build.{k}', a.build_limit
        yield 2, p, 'times', a.limit
        if p == 'qdq': yield 3, p, 'int8', a.limit
        if p == 'qdq' and 'fusion' in graphs: yield 3, p, 'pieces', a.limit
        yield 3, p, 'measure', a.limit
    if 'qdq' in precisions and 'fusion' in graphs: yield 3, 'qdq', 'wrong_scale', a.limit
    if 'fp16' in precisions and 'camera' in graphs: yield 3, 'fp16', 'overflow', a.limit
    for p in precisions:
        if p in ('fp16', 'qdq') and not a.no_layers:
            for k in graphs: yield 3, p, f'layers.{k}', a.limit
        if p in ('fp16', 'qdq') and a.refit:
            for k in graphs: yield 3, p, f'refit.{k}', a.build_limit

def cards():
    "Identifiers of the GPUs, or of those in CUDA_VISIBLE_DEVICES."
    if v := os.environ.get('CUDA_VISIBLE_DEVICES'): return v.split(',')
    try: return subprocess.run(['nvidia-smi', '--query-gpu=uuid', '--format=csv,noheader'], capture_output=True, text=True, timeout=20, env={k:v for k, v in os.environ.items() if not k.startswith('LD_')}).stdout.split() or [None]
    except OSError: return [None]

def start(a, job, p, step, card, alone, work):
    "The process of a step."
    name, fp32, int8, frames, _ = job
    part = work/f'{name}.{p}.{step}.json'
    part.unlink(missing_ok=True)
    cmd = [sys.executable, __file__, 'child', '--step', step, '--name', name, '--fp32', fp32, '--int8', int8, '--frames', frames, '--precision', p, '--part', str(part), '--work', str(work), '--found', a.found, '--out', a.out,
           *(o for k in ('runs', 'warmup', 'level', 'chunks', 'calibrate') for o in (f'--{k}', str(getattr(a, k)))), *(['--repair'] if a.repair else []), *(['--onnxruntime'] if a.onnxruntime else [])]
    env = {k:v for k, v in os.environ.items() if not (alone and k.startswith('CUDA_MPS'))}
    if card: env['CUDA_VISIBLE_DEVICES'] = card
    return subprocess.Popen(cmd, env=env), part

def run(a):
    "All steps of all jobs; what stands in the file is not done again."
    end, out, work, gpus = time.time()+a.budget, Path(a.out), Path(a.work), cards()
    out.parent.mkdir(parents=True, exist_ok=True); work.mkdir(parents=True, exist_ok=True)
    a.found = a.found or str(out.parent/'found')
    try: res = json.loads(out.read_text())
    except (OSError, ValueError): res = dict(format=1, what='precisions of exported graphs on one GPU', kind='tried with ONNX Runtime' if a.onnxruntime else 'measured', settings=dict(runs=a.runs, warmup=a.warmup, level=a.level, chunks=a.chunks, calibration_frames=a.calibrate, built_at_a_time=a.at_once*len(gpus), gpus=len(gpus)), machine=hardware(), jobs={})
    jobs = {j[0]:j for j in jobs_of(a)}
    for name, j in jobs.items(): res['jobs'].setdefault(name, dict(started=now(), fp32=Path(j[1]).name, int8=Path(j[2]).name, steps={}))
    todo = sorted(((r, i, name, p, step, limit) for name, j in jobs.items() for i, (r, p, step, limit) in enumerate(steps(j[1], j[4], a)) if f'{p}.{step}' not in a.skip and 'value' not in res['jobs'][name]['steps'].get(f'{p}.{step}', {})), key=lambda o: o[:2])
    for turn in range(4):
        waiting, running = [o for o in todo if o[0] == turn], []
        while waiting or running:
            left = end-time.time()-4
            for r in [r for r in running if r[0].poll() is not None or time.time() > r[2] or left < 0]:
                proc, part, until, card, name, key, began = r
                running.remove(r)
                if over := proc.poll() is None: proc.kill(); proc.wait()
                s = res['jobs'][name]['steps'][key] = json.loads(part.read_text()) if part.is_file() else dict(error=f'stopped after {time.time()-began:.0f} s' if over else f'ended without a word: {proc.returncode}')
                print(f"[{name}] {key}: "+(f"FAILED {s['error'][:200]}" if 'error' in s else f"{s['seconds']} s"), flush=True)
                put(out, res)
            for card in gpus:
                if waiting and left > 10 and sum(r[3] == card for r in running) < (1 if turn == 2 else a.at_once):
                    _, _, name, p, step, limit = waiting.pop(0)
                    proc, part = start(a, jobs[name], p, step, card, turn == 2, work)
                    running.append((proc, part, time.time()+limit, card, name, f'{p}.{step}', time.time()))
            if left <= 10:
                for _, _, name, p, step, _ in waiting: res['jobs'][name]['steps'][f'{p}.{step}'] = dict(error='not begun: no time was left')
                waiting = []
            time.sleep(.1)
        print(f'round {turn}: {a.budget-(end-time.time()):.0f} s', flush=True)
    put(out, res)
    out.with_name(f'{out.stem}_short.json').write_text(json.dumps(short(res), separators=(',', ':')))
    for f in work.glob('*/*/*.plan.*.json'):
        if f.name.split('.')[-2] in ('layers', 'kernels', 'times'): (out.parent/'told').mkdir(exist_ok=True); (out.parent/'told'/f'{f.parent.parent.name}.{f.parent.name}.{f.name}.gz').write_bytes(gzip.compress(f.read_bytes()))
    bad = {f'{n}.{k}':s['error'] for n, j in res['jobs'].items() for k, s in j['steps'].items() if 'error' in s}
    print(f"{sum('value' in s for j in res['jobs'].values() for s in j['steps'].values())} steps done, {len(bad)} failed or left"+''.join(f'\n  {k}: {e[:300]}' for k, e in bad.items()))

def short(res):
    "What is worth keeping."
    s = res['settings']
    flags = dict(at_once=s['built_at_a_time']//s['gpus'], level=s['level'], runs=s['runs'], chunks=s['chunks'], calibrate=s['calibration_frames'])
    cut = lambda v: None if v is None else round(v, 3)
    noise = lambda c: {g:{o:r['sqnr_db'] and round(r['sqnr_db'], 1) for o, r in part['outputs'].items() if 'sqnr_db' in r} for g, part in c['graphs'].items()}
    out = dict(what='TensorRT engines of exported graphs on one GPU: built in each precision, timed, held against ONNX Runtime', kind=res['kind'], date=res['machine']['date'][:10], hardware=res['machine'].get('gpu'), cpu=res['machine'].get('cpu'), cores=res['machine']['cores'], python=res['machine']['python'], versions=res['machine']['versions'], settings=res['settings'],
               note='times: inputs already on the GPU, one engine alone on it, by CUDA events', command='python .ci/gpu_precisions.py run '+' '.join([*(f'{n}=FP32:INT8:FRAMES' for n in res['jobs']), *(f"--{k.replace('_', '-')} {v}" for k, v in flags.items())]), jobs={})
    for name, j in res['jobs'].items():
        job = out['jobs'][name] = dict(precisions={}, failed={k:re.sub(r'/\S*/', '', s['error'])[:200] for k, s in j['steps'].items() if 'error' in s})
        for key, s in j['steps'].items():
            if 'value' not in s: continue
            (p, _, step), v = key.partition('.'), s['value']
            own = job['precisions'].setdefault(p, {})
            if step.startswith('build.'): own.setdefault('graphs', {}).setdefault(step[6:], {}).update(build_s=cut(v['seconds'].get('build')), bytes=v['bytes'], layers=(v.get('layers') or {}).get('types'), device_bytes=v.get('device_bytes'))
            elif step == 'times':
                for k, t in v.items(): own.setdefault('graphs', {}).setdefault(k, {}).update({i:cut(t[i]) for i in ('median_ms', 'p90_ms', 'p99_ms', 'max_ms')}, runs=t['runs'])
            elif step == 'measure': own.update(frames=v['frames'], sqnr_db=noise(v['against_own_graph']), sqnr_db_fp32=noise(v['against_fp32']))
            elif step == 'prepare': job['rows'] = v['rows']
            elif step in ('int8', 'pieces') or step.startswith('refit.'): own[step] = v
            elif step.startswith('layers.'): own.setdefault('layers', {})[step[7:]] = {k:v[k] for k in ('findings', 'tensors', 'compared', 'marked_sqnr_db')}
            else: job.setdefault('faults', {})[step] = v
    return out

def pack(a):
    "Frames of a dataset as .npz, images in the network's size."
    import numpy as np
    from bevorin.config import load_config
    from bevorin.data.nuscenes import NuScenesDataset, open_nuscenes
    from bevorin.pipeline import image_bytes
    cfg, out = load_config(a.config), Path(a.out)
    nusc = open_nuscenes(a.data)
    data = NuScenesDataset(cfg, a.data, [s['name'] for s in nusc.scene] if a.split == 'all' else a.split, sweeps=a.sweeps, nusc=nusc)
    out.mkdir(parents=True, exist_ok=True)
    for i in range(0, len(data), a.every):
        s = data[i]
        np.savez_compressed(out/f"{s['token']}.npz", images=image_bytes(s['images']), **{k:np.asarray(s[k]) for k in ('points', 'camera_intrinsics', 'camera2lidar', 'lidar2image', 'img_aug_matrix')})
    print(f'{out}: {len(range(0, len(data), a.every))} frames')

def score(a):
    "mAP, NDS and mIoU of what the engines found, by the evaluation of bevorin eval."
    import numpy as np
    from bevorin.config import load_config
    from bevorin.data.nuscenes import NuScenesDataset, collate, open_nuscenes
    from bevorin.train.evaluate import evaluate
    from bevorin.train import metrics
    if metrics.THRESHOLDS != THRESHOLDS: sys.exit('the thresholds of the metric are others')
    nusc, res, levels = open_nuscenes(a.data), {}, np.float32([0, *(t+.01 for t in THRESHOLDS)])
    data = NuScenesDataset(load_config(a.config), a.data, [s['name'] for s in nusc.scene] if a.split == 'all' else a.split, sweeps=a.sweeps, nusc=nusc)
    batches = [{k:v for k, v in collate([data.load(i)]).items() if k not in ('images', 'points')} for i in range(len(data))]
    for folder in sorted(p for p in Path(a.found).glob('*/*') if p.is_dir()):
        have = {f.stem for f in folder.glob('*.npz')}
        def predict(batch):
            def one(token):
                with np.load(folder/f'{token}.npz') as z: return {('masks' if k == 'passed' else k):levels[z[k]] if k == 'passed' else z[k] for k in z.files}
            return [one(t) for t in batch['token']]
        r = evaluate(predict, [b for b in batches if b['token'][0] in have], nusc, split=sorted(have), progress=False)
        res[f'{folder.parent.name}.{folder.name}'] = dict({k:round(100*r.headline[k], 2) for k in ('mAP', 'NDS', 'mIoU')}, frames=len(have))
        print(folder, res[f'{folder.parent.name}.{folder.name}'], flush=True)
    if a.short:
        kept = json.loads(Path(a.short).read_text())
        for k, v in res.items():
            job, _, p = k.partition('.')
            kept['jobs'][job]['precisions'][p]['accuracy'] = v
        Path(a.short).write_text(json.dumps(kept, separators=(',', ':')))
    put(a.out, res)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=('pack', 'run', 'score', 'child'))
    ap.add_argument('jobs', nargs='*', help='NAME=FP32:INT8:FRAMES[:PRECISIONS]')
    for k in ('config', 'data', 'found', 'short', 'frames', 'step', 'name', 'fp32', 'int8', 'precision', 'part'): ap.add_argument(f'--{k}')
    ap.add_argument('--split', default='val'); ap.add_argument('--every', type=int, default=1); ap.add_argument('--sweeps', type=int, default=9)
    ap.add_argument('--out', default='precisions.json'); ap.add_argument('--work', default='/tmp/precisions')
    ap.add_argument('--budget', type=float, default=540, help='seconds in all'); ap.add_argument('--limit', type=float, default=200, help='of one measurement'); ap.add_argument('--build-limit', type=float, default=200, dest='build_limit', help='of one build')
    ap.add_argument('--at-once', type=int, default=1, dest='at_once', help='processes on each GPU but for the times'); ap.add_argument('--runs', type=int, default=200); ap.add_argument('--warmup', type=int, default=20); ap.add_argument('--level', type=int, default=2, help='optimisation level of the builder; -1 for its own default, and before 8.6'); ap.add_argument('--chunks', type=int, default=0, help='see bevorin.deploy.layers.record'); ap.add_argument('--calibrate', type=int, default=4, help='frames')
    ap.add_argument('--skip', nargs='+', default=['cache.build.camera', 'calibrator.build.camera'], help='steps that are not tried; by default what TensorRT 8.6 did not build in four minutes')
    for k in ('repair', 'refit', 'onnxruntime', 'no-layers'): ap.add_argument(f'--{k}', action='store_true', dest=k.replace('-', '_'))
    a = ap.parse_args()
    if a.what == 'run' and not a.jobs: ap.error('give at least one job')
    dict(pack=pack, run=run, score=score, child=child)[a.what](a)

if __name__ == '__main__': main()
