"""Export the networks that `bevorin.orin.estimate` is fitted on, with random weights, and write their layer tables.

    .ci/graph_tables.py --out tests_data/orin                              all of them
    .ci/graph_tables.py --out tests_data/orin --only resnet50              some
    .ci/graph_tables.py --out tests_data/orin --bevfusion NAME=FOLDER …    exported BEVFusion graphs (a folder with spec.json)

Needs torch, onnx, onnxslim, torchvision, ultralytics and yolox (`--site` names a folder that they were installed to with `--no-deps`).
torchvision gives ResNet, ResNeXt, FPN and RetinaNet's heads; ultralytics YOLOv8, YOLOv10 and YOLO11; yolox YOLOX. SSD-ResNet-34,
SSD-MobileNet-v1 and DETR are written here after their published definitions (mlcommons/inference ssd_r34.py, TensorFlow's
ssd_mobilenet_v1_coco, facebookresearch/detr), and CenterPoint's dense part (tianweiy/CenterPoint). Post-processing after the heads (NMS) is not part of a table.
"""
import argparse,contextlib,io,os,sys,tempfile,types,warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings('ignore')

import onnxslim,torch
import torch.nn as nn
import torch.nn.functional as F
from bevorin.core import InputError,read_json
from bevorin.orin.estimate import frame_facts
from bevorin.orin.layers import layer_table,write_table

def site(folder):
    "Make the packages importable; their compiled parts are not needed."
    if folder: sys.path.insert(0, str(folder))
    os.environ.setdefault('YOLO_CONFIG_DIR', tempfile.mkdtemp())
    site.lib = torch.library.Library('torchvision', 'DEF')
    site.lib.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    register = torch.library.register_fake
    torch.library.register_fake = lambda name,*a,**k: (lambda f: f) if str(name).startswith('torchvision::') else register(name, *a, **k)
    quiet = types.SimpleNamespace(logger=types.SimpleNamespace(info=print, warning=print, error=print))
    sys.modules.setdefault('loguru', quiet)
    sys.modules.setdefault('thop', types.SimpleNamespace(profile=None))

def conv(i, o, k=1, s=1, p=None, g=1): return nn.Sequential(nn.Conv2d(i, o, k, s, k//2 if p is None else p, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU())

def resnet50():
    from torchvision.models import resnet50
    return resnet50(),(3,224,224)

class SSD(nn.Module):
    "Heads on the maps of a backbone and of the convolutions behind it."
    def __init__(self, backbone, taps, extras, heads, classes, kernel, stride):
        super().__init__()
        self.backbone,self.taps,self.extras = nn.ModuleList(backbone),taps,nn.ModuleList(extras)
        self.heads = nn.ModuleList(nn.Conv2d(c, a*n, kernel, stride, kernel//2) for c,a in heads for n in (4,classes))
    def forward(self, x):
        maps = []
        for i,m in enumerate(self.backbone):
            x = m(x)
            if i in self.taps: maps.append(x)
        for m in self.extras: maps.append(x := m(x))
        outs = [(self.heads[2*i](m).flatten(2),self.heads[2*i+1](m).flatten(2)) for i,m in enumerate(maps)]
        return tuple(o for pair in outs for o in pair)

def ssd_resnet34():
    from torchvision.models import resnet34
    r = resnet34()
    r.layer3[0].conv1.stride = r.layer3[0].downsample[0].stride = (1,1)
    two = lambda i,mid,o,s,p: nn.Sequential(nn.Conv2d(i, mid, 1), nn.ReLU(), nn.Conv2d(mid, o, 3, s, p), nn.ReLU())
    extras = [two(256, 256, 512, 2, 1), two(512, 256, 512, 2, 1), two(512, 128, 256, 2, 1), two(256, 128, 256, 2, 0), two(256, 128, 256, 1, 0)]
    return SSD([r.conv1, r.bn1, r.relu, r.maxpool, r.layer1, r.layer2, r.layer3], {6}, extras, [(256,4),(512,6),(512,6),(256,6),(256,4),(256,4)], 81, 3, 3),(3,1200,1200)

def ssd_mobilenet():
    plan = [(32,64,1),(64,128,2),(128,128,1),(128,256,2),(256,256,1),(256,512,2),*[(512,512,1)]*5,(512,1024,2),(1024,1024,1)]
    body = [conv(3, 32, 3, 2)] + [nn.Sequential(conv(i, i, 3, s, g=i), conv(i, o)) for i,o,s in plan]
    two = lambda i,mid,o: nn.Sequential(conv(i, mid), conv(mid, o, 3, 2))
    return SSD(body, {11,13}, [two(1024, 256, 512), two(512, 128, 256), two(256, 128, 256), two(256, 64, 128)], [(512,3),(1024,6),(512,6),(256,6),(256,6),(128,6)], 91, 1, 1),(3,300,300)

def retinanet(body, classes, size):
    from torchvision.models import resnet34,resnext50_32x4d
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            net = dict(resnet34=resnet34, resnext50=resnext50_32x4d)[body](norm_layer=nn.BatchNorm2d)
            self.body,self.head = _resnet_fpn_extractor(net, 5, returned_layers=[2,3,4], extra_blocks=LastLevelP6P7(256, 256)),RetinaNetHead(256, 9, classes)
        def forward(self, x):
            maps = list(self.body(x).values())
            heads = self.head.classification_head,self.head.regression_head
            return tuple(o(h.conv(m)) for h,o in ((heads[0],heads[0].cls_logits),(heads[1],heads[1].bbox_reg)) for m in maps)
    return Net(),(3,*size)

def backbone34():
    from torchvision.models import resnet34
    r = resnet34()
    return nn.Sequential(r.conv1, r.bn1, r.relu, r.maxpool, r.layer1, r.layer2, r.layer3, r.layer4),(3,768,1280)

class Attend(nn.Module):
    def __init__(self, d=256, heads=8):
        super().__init__()
        self.q,self.k,self.v,self.o,self.heads = *(nn.Linear(d, d) for _ in range(4)),heads
    def forward(self, q, k, v):
        split = lambda x: x.unflatten(-1, (self.heads,-1)).transpose(1, 2)
        a = (split(self.q(q))/32**.5 @ split(self.k(k)).transpose(-1, -2)).softmax(-1)
        return self.o((a @ split(self.v(v))).transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, cross, d=256, ff=2048):
        super().__init__()
        self.att = nn.ModuleList(Attend(d) for _ in range(1+cross))
        self.ff,self.norms = nn.Sequential(nn.Linear(d, ff), nn.ReLU(), nn.Linear(ff, d)),nn.ModuleList(nn.LayerNorm(d) for _ in range(2+cross))
    def forward(self, x, pos, memory=None, mpos=None):
        x = self.norms[0](x+self.att[0](x+pos, x+pos, x))
        if memory is not None: x = self.norms[2](x+self.att[1](x+pos, memory+mpos, memory))
        return self.norms[1](x+self.ff(x))

class DETR(nn.Module):
    def __init__(self, hw):
        super().__init__()
        from torchvision.models import resnet50
        r = resnet50()
        self.body = nn.Sequential(r.conv1, r.bn1, r.relu, r.maxpool, r.layer1, r.layer2, r.layer3, r.layer4)
        self.proj,self.enc,self.dec = nn.Conv2d(2048, 256, 1),nn.ModuleList(Block(0) for _ in range(6)),nn.ModuleList(Block(1) for _ in range(6))
        self.pos,self.query = nn.Parameter(torch.randn(1, hw, 256)),nn.Parameter(torch.randn(1, 100, 256))
        self.norm,self.cls,self.box = nn.LayerNorm(256),nn.Linear(256, 92),nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    def forward(self, x):
        m = self.proj(self.body(x)).flatten(2).transpose(1, 2)
        for b in self.enc: m = b(m, self.pos)
        q = self.query*0.
        for b in self.dec: q = b(q, self.query, m, self.pos)
        q = self.norm(q)
        return self.cls(q),self.box(q).sigmoid()

def yolo(name, size):
    from ultralytics.nn.tasks import DetectionModel
    m = DetectionModel(f'{name}.yaml', verbose=False).eval().fuse(verbose=False)
    for o in m.modules():
        if hasattr(o, 'export'): o.export,o.format,o.dynamic = True,'onnx',False
    return m,(3,size,size)

def yolox(size):
    from yolox.models import YOLOX,YOLOPAFPN,YOLOXHead
    m = YOLOX(YOLOPAFPN(.67, .75), YOLOXHead(80, .75))
    m.head.decode_in_inference = False
    return m,(3,size,size)

class CenterPoint(nn.Module):
    "What stands behind the sparse encoder of CenterPoint (0.075 m): RPN, and six heads of six branches."
    def __init__(self):
        super().__init__()
        block = lambda i,o,s: nn.Sequential(conv(i, o, 3, s), *(conv(o, o, 3) for _ in range(5)))
        self.blocks = nn.ModuleList([block(256, 128, 1), block(128, 256, 2)])
        self.up = nn.ModuleList([conv(128, 256), nn.Sequential(nn.ConvTranspose2d(256, 256, 2, 2, bias=False), nn.BatchNorm2d(256), nn.ReLU())])
        self.shared = conv(512, 64, 3)
        self.heads = nn.ModuleList(nn.Sequential(conv(64, 64, 3), nn.Conv2d(64, o, 3, 1, 1)) for classes in (1,2,2,1,2,2) for o in (2,1,3,2,2,classes))
    def forward(self, x):
        a = self.blocks[0](x)
        x = self.shared(torch.cat([self.up[0](a), self.up[1](self.blocks[1](a))], 1))
        return tuple(h(x) for h in self.heads)

NETS = {'resnet50':resnet50, 'ssd-resnet34':ssd_resnet34, 'ssd-mobilenet-v1':ssd_mobilenet, 'retinanet-resnext50':lambda: retinanet('resnext50', 264, (800,800)),
        'retinanet-resnet34':lambda: retinanet('resnet34', 3, (768,1280)), 'resnet34-backbone':backbone34, 'detr-r50':lambda: (DETR(25*34),(3,800,1066)),
        **{n:(lambda n=n: yolo(n, 640)) for n in ('yolo11n','yolo11s','yolo11m','yolov8s','yolov8m','yolov10s')}, 'yoloxm':lambda: yolox(640),
        'centerpoint-rpn':lambda: (CenterPoint(),(256,180,180))}

@torch.no_grad()
def export(name, path):
    model,shape = NETS[name]()
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model.eval(), (torch.zeros(1, *shape),), str(path), opset_version=17, dynamo=False, do_constant_folding=True)
    onnxslim.slim(str(path), str(path))

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', required=True, type=Path)
    ap.add_argument('--site', type=Path)
    ap.add_argument('--only', nargs='+', default=[])
    ap.add_argument('--keep', type=Path, help='a folder for the ONNX files; those that are there are used again')
    ap.add_argument('--bevfusion', nargs='+', default=[], metavar='NAME=FOLDER')
    ap.add_argument('--anonymous', action='store_true', help='no names of layers in the tables of --bevfusion')
    ap.add_argument('--voxels', type=int, default=137000, help='of the LiDAR graph')
    a = ap.parse_args(argv)
    if odd := [n for n in a.only if n not in NETS]: raise InputError(f'--only {odd[0]}: there are {", ".join(NETS)}')
    a.out.mkdir(parents=True, exist_ok=True)
    if not a.bevfusion or a.only:
        site(a.site)
        with tempfile.TemporaryDirectory() as d:
            for name in a.only or NETS:
                path = Path(a.keep or d)/f'{name}.onnx'
                if not path.exists(): export(name, path)
                t = layer_table(path, name=name)
                write_table(t, a.out/f'{name}.json', names=False)
                print(f"{name}: {len(t['layers'])} layers, {t['gmac']:.2f} GMAC, {(a.out/f'{name}.json').stat().st_size/1e3:.1f} kB")
    for item in a.bevfusion:
        name,_,folder = item.partition('=')
        spec = read_json(Path(folder)/'spec.json')
        usual = {k:v[1] for k,v in spec.get('dynamic', {}).items()}
        sizes = {k:round(v*a.voxels/usual['n1']) for k,v in usual.items()}
        for g,o in spec['graphs'].items():
            t = layer_table(Path(folder)/o['file'], name=f'{name}-{g}', sizes=sizes, keep_fp32=o.get('keep_fp32', ()))
            if g == 'camera': t['frame'] = frame_facts(spec)
            write_table(t, a.out/f'{name}-{g}.json', names=not a.anonymous)
            print(f"{name}-{g}: {len(t['layers'])} layers, {t['gmac']:.2f} GMAC, {(a.out/f'{name}-{g}.json').stat().st_size/1e3:.1f} kB")

if __name__ == '__main__': main()
