"""What `make test` runs: one function a check, a line PASS or FAIL for each, and what was wrong after a FAIL.

    .ci/check.py                    all of them
    .ci/check.py NAME ...           these
    .ci/check.py --but NAME ...     all but these
"""
import argparse,ast,filecmp,json,os,re,shutil,signal,subprocess,sys,tempfile,time,venv
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOK_LIMIT_S = 900
NO_COPY = {'.git','.venv','.gpu','_docs','_proc','runs','build','dist','bevorin.egg-info'}

# The part that runs on the board, as the first names of its modules; all of it imports with numpy alone.
TORCH_FREE = 'core','config','runs','target','deploy','orin'
NEEDS_TORCH = 'deploy.export',
# Which rooms of the package each room may import besides itself; those not named here may import all.
ROOMS = dict(core='', config='core', target='core', runs='core', model='core config', data='core config',
             train='core config model data', optimize='core config model data train',
             deploy='core config target runs', orin='core config target runs deploy')
ALSO = {'deploy.export': 'model'}

# What the core requirements install.
CORE = {'numpy','fastcore','yaml','PIL','matplotlib','rich','tqdm'}
# What only an extra (or pytorch-quantization, tensorrt and pycuda, which none can bring) installs.
OPTIONAL = {'torch','scipy','nuscenes','torch_pruning','modelopt','pytorch_quantization','onnx','onnxscript','onnxslim',
            'onnx_graphsurgeon','polygraphy','onnxruntime','tensorrt','tensorrt_rtx','tensorrt_rtx_bindings','pycuda','triton','jtop'}

class Fault(Exception): "A check that did not pass; its text says why."

def need(ok, why):
    if not ok: raise Fault(why)

def run(*args, cwd=ROOT, limit=600, **env):
    "Run a command, all of its processes ended at `limit` seconds; its output, or a `Fault` with the end of it."
    p = subprocess.Popen([*map(str, args)], cwd=cwd, env={**os.environ, **env}, text=True, encoding='utf-8', errors='replace',
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try: out,_ = p.communicate(timeout=limit)
    except BaseException as e:
        os.killpg(p.pid, signal.SIGKILL)
        out,_ = p.communicate()
        if not isinstance(e, subprocess.TimeoutExpired): raise
        raise Fault(f'{Path(args[0]).name} was not done after {limit} s\n{out[-4000:]}') from None
    need(p.returncode==0, f'{Path(args[0]).name} ended with status {p.returncode}\n{out[-6000:]}')
    return out

@cache
def tmp():
    "One temporary folder for the whole run."
    return Path(tempfile.mkdtemp(prefix='bevorin-check-'))

def tree(name):
    "A fresh copy of the repository."
    dest = tmp()/name
    def left_out(folder, names): return {n for n in names if n in ('__pycache__', '.ipynb_checkpoints') or (Path(folder)==ROOT and n in NO_COPY)}
    shutil.copytree(ROOT, dest, symlinks=True, ignore=left_out)
    return dest

def files(folder, pattern='*'): return {p.relative_to(folder) for p in folder.rglob(pattern) if p.is_file() and '__pycache__' not in p.parts}

def notebooks(folder): return {p for p in files(folder, '*.ipynb') if not any(o[0] in '_.' for o in p.parts)}

def differing(a, b, which):
    "A line for each file of `which` that `a` and `b` do not share, byte by byte."
    return [f'{p}: ' + ('missing' if not (a/p).exists() else 'left over' if not (b/p).exists() else 'differs')
            for p in sorted(which) if not ((a/p).exists() and (b/p).exists() and filecmp.cmp(a/p, b/p, shallow=False))]

def modules():
    "All modules of the package, by the files under bevorin/."
    names = ('.'.join(p.with_suffix('').parts).removesuffix('.__init__') for p in files(ROOT/'bevorin', '*.py'))
    return sorted('bevorin' if n=='__init__' else f'bevorin.{n}' for n in names)

def torch_free(mod):
    name = mod.removeprefix('bevorin').lstrip('.')
    return not name or name=='_modidx' or (name.split('.')[0] in TORCH_FREE and name not in NEEDS_TORCH)


def modules_match():
    "the modules are what the notebooks export"
    new = tree('export')
    for p in files(new/'bevorin', '*.py'): (new/'bevorin'/p).unlink()
    run(BIN/'nbdev_export', cwd=new)
    a,b = ROOT/'bevorin',new/'bevorin'
    bad = differing(a, b, files(a) | files(b)) + differing(ROOT, new, [Path('pyproject.toml')])
    need(not bad, '\n'.join(bad) + '\nnbdev_export writes the modules anew; a left-over one is to be deleted')
    return f'{len(files(a, "*.py"))} files'

def imported(path, package):
    "The full names that a module's `import` statements ask for, those inside functions too."
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            base = '.'.join(filter(None, [*package[:len(package)-n.level+1], n.module])) if n.level else n.module
            yield from (f'{base}.{a.name}' for a in n.names)

def imports_allowed():
    "no module imports a package that nothing declares, or a room of the house that lies above its own"
    bad = []
    for p in sorted(files(ROOT/'bevorin', '*.py')):
        room = p.parts[0].removesuffix('.py')
        name = '.'.join(p.with_suffix('').parts)
        rooms = {room, *ROOMS.get(room, '').split(), *ALSO.get(name, '').split()}
        for i in imported(ROOT/'bevorin'/p, ('bevorin', *p.parent.parts)):
            top,_,rest = i.partition('.')
            if top=='bevorin':
                if rest and room in ROOMS and rest.split('.')[0] not in rooms: bad.append(f'{p} imports {i}: not a room below {room}')
            elif top not in sys.stdlib_module_names | CORE | OPTIONAL: bad.append(f'{p} imports {top}, which no requirement names')
    need(not bad, '\n'.join(bad))
    return f'{len(modules())} modules'

def mixed_cells(path):
    "The cells of a notebook that import and do something else too, exported ones excepted: the docs would run all of it."
    for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        src = ''.join(c['source'])
        if c['cell_type']!='code' or re.search(r'^#\|\s*(export|eval: *false)', src, re.M): continue
        try: tree = ast.parse(re.sub(r'^\s*[%!].*', '', src, flags=re.M))
        except SyntaxError: continue
        imp = ast.Import,ast.ImportFrom
        if any(isinstance(n, imp) for n in ast.walk(tree)) and not all(isinstance(n, imp) for n in tree.body):
            yield f'{path.name}, cell {i}: {next((l for l in src.splitlines() if l[:2] not in ("", "#|")), "")[:80]}'

def warned_cells(path):
    "The cells of a notebook whose stored outputs hold what went to standard error: warnings, progress, paths of one machine."
    for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        err = ''.join(''.join(o['text']) for o in c.get('outputs', []) if o.get('name')=='stderr').strip()
        if err: yield f'{path.name}, cell {i}: {err.splitlines()[0][:80]}'

def notebooks_clean():
    "the notebooks are clean: no counters or changing metadata, no stored warnings, imports in cells of their own, under 600 kB"
    new = tree('clean')
    run(BIN/'nbdev_clean', cwd=new)
    nbs = sorted(notebooks(ROOT/'nbs'))
    bad = ([f'{l} (nbdev_clean cleans it)' for l in differing(ROOT/'nbs', new/'nbs', nbs)] +
           [f'{p}: {kb:.0f} kB' for p in nbs if (kb := (ROOT/'nbs'/p).stat().st_size/1e3) > 600] +
           [f'{l} (stored output of standard error)' for p in nbs for l in warned_cells(ROOT/'nbs'/p)] +
           [f'{l} (imports and more: the docs would run all of it)' for p in nbs for l in mixed_cells(ROOT/'nbs'/p)])
    need(not bad, '\n'.join(bad))
    return f'{len(nbs)} notebooks'

def notebooks_run():
    "the notebooks run, every assertion holds, and they leave nothing behind"
    from nbdev.doclinks import nbglob
    os.chdir(ROOT)
    n = len(nbglob())
    need(n and n==len(notebooks(ROOT/'nbs')), f'nbdev would run {n} of {len(notebooks(ROOT/"nbs"))} notebooks')
    places = 'nbs','tests_data','bevorin'
    before = {p:files(ROOT/p) for p in places}
    try: out = run(BIN/'nbdev_test', '--n_workers', 2, '--do_print', limit=NOTEBOOK_LIMIT_S, OMP_NUM_THREADS='1')
    except Fault as e: raise Fault(re.sub(r'^(Starting|- Completed) .*\n', '', str(e), flags=re.M)) from None
    done = out.count('- Completed ')
    need('Success.' in out and done==n, f'{done} of {n} notebooks were run\n{out[-4000:]}')
    left = sorted(f'{p}/{f}' for p in places for f in files(ROOT/p)-before[p])
    need(not left, 'left behind by the tests: ' + ', '.join(left))
    return f'{n} notebooks'

@cache
def wheel():
    "The wheel, built from the source distribution (so that one is complete too)."
    src,dest = tree('build'),tmp()/'dist'
    run(BIN/'python', '-m', 'build', '--no-isolation', '--outdir', dest, src)
    whl, = dest.glob('*.whl')
    return whl

@cache
def clean_env():
    "A new environment with the wheel and what it requires, nothing else."
    d = tmp()/'venv'
    venv.create(d, with_pip=True)
    run(d/'bin/python', '-m', 'pip', 'install', '--quiet', '-c', ROOT/'constraints.txt', wheel())
    return d/'bin'

IMPORT = '''
import importlib,sys,traceback
for m in sys.argv[1:]:
    try: print('ok', m, importlib.import_module(m).__file__)
    except ModuleNotFoundError as e: print('missing', m, e.name)
    except BaseException as e: print('error', m, traceback.format_exc().replace(chr(10), ' | '))
'''

def imports(python, mods, before='', **env):
    "How each module imports in `python`, outside the repository: [status, module, what is missing | where it is | traceback]."
    out = run(python, '-c', before+IMPORT, *mods, cwd=tmp(), **env)
    return [r for l in out.splitlines() if (r := l.split(' ', 2))[0] in ('ok', 'missing', 'error')]

def wheel_imports():
    "the wheel in a clean environment: everything imports that needs no extra, and `bevorin --help` works"
    mods,res = modules(),imports(clean_env()/'python', modules())
    extra = OPTIONAL & {p.name for p in (clean_env().parent/'lib').glob('*/site-packages/*')}
    need(not extra, f'the core requirements bring {", ".join(sorted(extra))}')
    need(len(res)==len(mods), f'asked for {len(mods)} modules, heard of {len(res)}')
    bad = [f'{m}: {status} {what}' for status,m,what in res if status!='ok' and
           (status=='error' or torch_free(m) or m=='bevorin.cli' or what.split('.')[0] not in OPTIONAL)]
    need(not bad, '\n'.join(bad))
    help = run(clean_env()/'bevorin', '--help', cwd=tmp())
    need('usage' in help.lower(), f'bevorin --help says\n{help[:500]}')
    return f'{sum(r[0]=="ok" for r in res)} of {len(res)} modules, {len(res)-sum(r[0]=="ok" for r in res)} wait for an extra'

def wheel_imports_with_extras():
    "the wheel beside all extras: every module imports, and from the wheel"
    lib = tmp()/'unpacked'
    shutil.unpack_archive(wheel(), lib, 'zip')
    res = imports(sys.executable, modules(), PYTHONPATH=str(lib))
    bad = [f'{m}: {status} {what}' for status,m,what in res if status!='ok' or not what.startswith(str(lib))]
    need(not bad and len(res)==len(modules()), '\n'.join(bad) or 'not every module was tried')
    return f'{len(res)} modules'

NUMPY_ONLY = '''
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] not in sys.stdlib_module_names | {'numpy', 'bevorin'}: raise ModuleNotFoundError(f'no {name} here', name=name)
sys.meta_path.insert(0, Only())
'''

def torch_free_side():
    "the part for the board imports with numpy alone"
    mods = [m for m in modules() if torch_free(m)]
    res = imports(clean_env()/'python', mods, before=NUMPY_ONLY)
    bad = [f'{m}: {status} {what}' for status,m,what in res if status!='ok']
    need(not bad and len(res)==len(mods), '\n'.join(bad) or 'not every module was tried')
    return ', '.join(m.removeprefix('bevorin.') for m in mods if m not in ('bevorin', 'bevorin._modidx'))

def site_and_readme():
    "the site renders, no link inside it is broken, every page is in the sidebar, README.md is that of index.ipynb"
    new = tree('site')
    out = run(BIN/'python', '.ci/docs.py', '--pandoc', cwd=new, PYTHONPATH=str(new))
    a,b = ROOT/'index_files',new/'index_files'
    bad = differing(ROOT, new, [Path('README.md')]) + differing(a, b, files(a) | files(b))
    need(not bad, '\n'.join(bad) + '\nmake docs writes them anew')
    return out.strip().splitlines()[-1]

CHECKS = [modules_match, imports_allowed, notebooks_clean, notebooks_run, wheel_imports, wheel_imports_with_extras, torch_free_side, site_and_readme]

def main():
    names = {f.__name__:f for f in CHECKS}
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument('only', nargs='*', metavar='NAME', help=', '.join(names))
    ap.add_argument('--but', nargs='+', default=[], metavar='NAME', help='leave these out')
    args = ap.parse_args()
    unknown = {*args.only, *args.but} - {*names}
    if unknown: ap.error(f'no check {", ".join(sorted(unknown))}; there are {", ".join(names)}')
    passed = failed = 0
    try:
        for name in names:
            if name in args.but or (args.only and name not in args.only): continue
            start = time.time()
            try: word,note,why = 'PASS',names[name](),''
            except Fault as e: word,note,why = 'FAIL',names[name].__doc__,str(e)
            failed += word=='FAIL'
            passed += word=='PASS'
            print(f'{word} {name} ({time.time()-start:.0f} s): {note}', *(f'     {l}' for l in why.splitlines()), sep='\n', flush=True)
    finally: shutil.rmtree(tmp(), ignore_errors=True)
    print(f'{passed} passed, {failed} failed')
    return bool(failed or not passed)

if __name__=='__main__': sys.exit(main())
