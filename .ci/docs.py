"""README.md and the site in _docs/, both made from the notebooks.

With quarto on the PATH `nbdev_docs` makes the site. Without it pandoc makes the same pages (nbdev's own processing,
the sidebar of _quarto.yml), so the site can be looked at, and its links checked, on any machine that runs the tests.
"""
import argparse,ast,base64,os,re,shutil,subprocess,sys
from concurrent.futures import ThreadPoolExecutor
from html import escape
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote,urlsplit

import nbformat,pypandoc,yaml
from nbdev.config import get_config

HERE = Path(__file__).resolve().parent
READER = 'markdown-smart+lists_without_preceding_blankline'
IMAGES = {'image/png':'png', 'image/jpeg':'jpg', 'image/svg+xml':'svg'}


# notebooks -> markdown

class Page:
    "One processed notebook: `src` is its path under nbs/, `out` that of its HTML page under the site."
    def __init__(self, proc, nbs, src):
        self.src, self.nb = src, nbformat.read(proc/src, 4)
        first = self.nb.cells[0]
        meta = yaml.safe_load(first.source.strip().strip('-')) if first.cell_type=='raw' else {}
        self.title, self.description = meta.get('title', src.stem), meta.get('description', '')
        self.out = src.parent/meta.get('output-file', f'{src.stem}.html')
        self.sources = exported_sources(nbformat.read(nbs/src, 4))

def process(root):
    "All notebooks after nbdev's processing (exported cells replaced by their documentation), in the sidebar's order."
    from nbdev.serve import proc_nbs
    os.environ['PYTHONWARNINGS'] = 'ignore::UserWarning'
    try: proc, nbs = Path(proc_nbs(n_workers=2, force=True)), root/'nbs'
    except Exception as e: raise SystemExit(f'{e}\n(the docs run every cell that exports or imports, and no other: '
                                            'imports go into a cell of their own)') from None
    return [Page(proc, nbs, p.relative_to(proc)) for p in sorted(proc.rglob('*.ipynb'))]

def exported_sources(nb):
    "name -> (names defined in the same cell, in order; the cell's code), for each exported public definition."
    from nbdev.showdoc import showdoc_nm
    res = {}
    for c in nb.cells:
        if c.cell_type!='code' or not re.search(r'^#\|\s*export\s*$', c.source, re.M): continue
        code = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|')).strip()
        names = [showdoc_nm(d) for d in ast.parse(code).body if isinstance(d, (ast.FunctionDef, ast.ClassDef)) and d.name[0]!='_']
        for n in names: res[n] = names,code
    return res

def documented(cell):
    "What a cell documents: the name in its `show_doc(name)`, or None."
    m = re.search(r'^show_doc\(([\w.]+)', cell.source, re.M) if cell.cell_type=='code' else None
    return m and m[1]

def fence(text, attrs=''):
    ticks = '`' * max(3, 1+max(map(len, re.findall('`+', text)), default=0))
    return f'{ticks}{attrs}\n{text.rstrip()}\n{ticks}'

def div(body, *classes): return f":::::: {{{' '.join('.'+c for c in classes)}}}\n{body}\n::::::"

def details(summary, body): return f'<details><summary>{summary}</summary>\n\n{body}\n\n</details>'

def output_md(o, image, plain=False):
    "One output of a cell as markdown; `image(ext, bytes)` stores a picture and gives its address; `plain` keeps HTML out."
    if o.output_type=='stream': return div(fence(o.text, '{.stream}'), 'cell-output')
    if o.output_type=='error': return div(fence(f'{o.ename}: {o.evalue}', '{.stream}'), 'cell-output', 'error')
    d = o.data
    if 'text/html' in d and not plain: return div(fence(d['text/html'], '{=html}'), 'cell-output')
    if 'text/markdown' in d: return div(d['text/markdown'], 'cell-output')
    if 'text/latex' in d: return div(d['text/latex'], 'cell-output')
    for mime,ext in IMAGES.items():
        if mime in d:
            data = d[mime].encode() if ext=='svg' else base64.b64decode(d[mime])
            return div(f'![]({image(ext, data)})', 'cell-output')
    return div(fence(d['text/plain'], '{.plain}'), 'cell-output') if 'text/plain' in d else ''

def merged(outputs):
    "The outputs with neighbouring streams joined, as a terminal would show them: of a line rewritten in place, its last state."
    for is_stream,group in groupby(outputs, lambda o: o.output_type=='stream'):
        if not is_stream: yield from group; continue
        text = ''.join(o.text for o in group)
        yield nbformat.v4.new_output('stream', text='\n'.join(l.rstrip().rpartition('\r')[2] for l in text.split('\n')))

def code_md(cell, image, plain):
    "A code cell and its outputs as markdown."
    lines = cell.source.splitlines()
    opts = dict(re.match(r'#\|\s*([\w-]+):\s*(.*)', l).groups() for l in lines if re.match(r'#\|\s*[\w-]+:', l))
    code = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
    if opts.get('include')=='false': return ''
    res = []
    if code and opts.get('echo')!='false':
        block = fence(code, '{.python}')
        res.append(details(opts.get('code-summary', 'Code').strip('"'), block) if opts.get('code-fold')=='true' else block)
    if opts.get('output')!='false': res += [output_md(o, image, plain) for o in merged(cell.outputs)]
    return '\n\n'.join(res)

def doc_md(cell):
    "What `show_doc` says: no rule above it, and no link to a source that is on the page."
    md = ''.join(o.data.get('text/markdown', '') for o in cell.outputs if 'data' in o)
    md = re.sub(r'\[source\]\([^)]*\)(\{[^}]*\})?', '', re.sub(r'^---\s*', '', md))
    return re.sub(r'```.*?```', lambda m: signature(m[0]), md, flags=re.S)

def signature(text):
    "A signature as code: links undone, and an option `name:type <help>=default` on a line of its own with the help as comment."
    text = re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', text)
    text = re.sub(r'(\w+):(\w+) <([^<>\n]*)>(=[^,\n]*)?,? *', r'\1:\2\4, # \3\n    ', text)
    return re.sub(r'\n\s*\n', '\n', text)

def docs_md(cells, sources):
    "Neighbouring `show_doc` cells, those of one exported cell in its order (nbdev turns it round), its code after the last."
    res = []
    for (names,code),group in groupby(cells, lambda c: sources.get(documented(c), ((), ''))):
        group = sorted(group, key=lambda c: names.index(documented(c))) if names else list(group)
        docs = [doc_md(c) for c in group]
        if code: docs[-1] += '\n\n' + details('Source', fence(code, '{.python}'))
        res += [div(d, 'doc') for d in docs]
    return '\n\n'.join(res)

def to_markdown(page, image, plain=False):
    cells = [c for c in page.nb.cells if c.cell_type!='raw' and not c.source.startswith('<!-- WARNING')]
    res = []
    for is_doc,group in groupby(cells, lambda c: bool(documented(c))):
        if is_doc: res.append(docs_md(group, page.sources))
        else: res += [c.source if c.cell_type=='markdown' else code_md(c, image, plain) for c in group]
    return '\n\n'.join(res)


# markdown -> README.md, HTML

def pandoc(text, *args):
    r = subprocess.run([pypandoc.get_pandoc_path(), '-f', READER, '--columns=10000', *args], input=text, text=True, capture_output=True, encoding='utf-8')
    if r.returncode or r.stderr: raise SystemExit(f'pandoc: {r.stderr.strip()}')
    return r.stdout

def write_readme(page, root, site_url):
    "README.md and its pictures (index_files/) in `root`, from the page of index.ipynb."
    figs = root/'index_files'
    shutil.rmtree(figs, ignore_errors=True)
    md = to_markdown(page, Figures(figs, root), plain=True)
    md = re.sub(r'^:::+.*\n?', '', md, flags=re.M).replace('{.stream}','').replace('{.plain}','')
    md = re.sub(rf'\[(`[^`]+`)\]\({re.escape(site_url)}[^)]*\)', r'\1', md)
    md = re.sub(r'\]\((?![a-z]+:)([^)\s]+\.ipynb)', r'](nbs/\1', md)
    md = f'<!-- made from nbs/{page.src}: change that, then `make docs` -->\n\n# {page.title}\n\n> {page.description}\n\n{md}'
    md = md.replace('](images/', '](nbs/images/')
    (root/'README.md').write_text(pandoc(md, '-t', 'gfm-smart', '--wrap=preserve'), encoding='utf-8')

class Figures:
    "Writes a page's pictures into `folder`, numbered; the address is relative to `base`."
    def __init__(self, folder, base): self.folder,self.base,self.n = folder,base,0
    def __call__(self, ext, data):
        self.n += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        p = self.folder/f'figure-{self.n}.{ext}'
        p.write_bytes(data)
        return p.relative_to(self.base).as_posix()

def up(page): return '../'*len(page.out.parent.parts)

def sidebar(items, pages, here, missing):
    "The sidebar's HTML on the page `here`; what `items` name and `pages` lack goes into `missing`."
    html = ''
    for i in items:
        if isinstance(i, dict) and 'section' in i:
            html += f"<li><span>{escape(i['section'])}</span>{sidebar(i['contents'], pages, here, missing)}</li>"
            continue
        href,text = (i['href'],i.get('text')) if isinstance(i, dict) else (i,None)
        page = pages.get(href)
        if page is None: missing.append(href); continue
        cls = ' class="active"' if page is here else ''
        html += f'<li><a href="{up(here)}{page.out.as_posix()}"{cls}>{escape(text or page.title)}</a></li>'
    return f'<ul>{html}</ul>'

def listed(items):
    "The notebooks of a sidebar's contents, in order."
    for i in items:
        if isinstance(i, dict) and 'section' in i: yield from listed(i['contents'])
        else: yield i['href'] if isinstance(i, dict) else i

def fix_links(html, page, pages, site_url):
    "Links to a notebook become links to its page; absolute links into our own site become relative ones."
    html = html.replace(f'href="{site_url}', f'href="{up(page)}')
    def to_page(m):
        target = pages.get(os.path.normpath((page.src.parent/unquote(m[1])).as_posix()))
        return f'href="{up(page)}{target.out.as_posix()}' if target else m[0]
    return re.sub(r'href="(?![a-z]+:)([^"#]+\.ipynb)', to_page, html)

def write_page(page, pages, order, contents, site_url, out):
    dest = out/page.out
    dest.parent.mkdir(parents=True, exist_ok=True)
    md = to_markdown(page, Figures(dest.parent/f'{dest.stem}_files', dest.parent))
    i = order.index(page) if page in order else None
    link = lambda p: f'<a href="{up(page)}{p.out.as_posix()}">{escape(p.title)}</a>'
    lead = re.sub('`(.+?)`', r'<code>\1</code>', escape(page.description))
    v = dict(pagetitle=escape(page.title), description=escape(page.description), lead=lead, root=up(page), sidebar=sidebar(contents, pages, page, []))
    if i: v['prev'] = link(order[i-1])
    if i is not None and i+1<len(order): v['next'] = link(order[i+1])
    html = pandoc(md, '-t', 'html5', '--mathml', '--toc', '--toc-depth=3', '--standalone', '--syntax-highlighting=kate',
                  f"--template={HERE/'page.html'}", *(a for k,x in v.items() for a in ('-V', f'{k}={x}')))
    dest.write_text(fix_links(html, page, pages, site_url), encoding='utf-8')

def write_site(all_pages, root, out, site_url):
    "The whole site in `out`; gives what is wrong with the sidebar."
    contents = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    pages = {p.src.as_posix():p for p in all_pages}
    names = list(listed(contents))
    order = [pages[n] for n in names if n in pages]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(HERE/'site.css', out)
    shutil.copytree(HERE.parent/'nbs'/'images', out/'images')
    with ThreadPoolExecutor(2) as ex: list(ex.map(lambda p: write_page(p, pages, order, contents, site_url, out), all_pages))
    return ([f'_quarto.yml: the sidebar names {n}, which does not exist' for n in names if n not in pages] +
            [f'_quarto.yml: the sidebar lacks {n}' for n in pages if n not in names])


# what a browser would miss

class Links(HTMLParser):
    "The ids a page has and the addresses it asks for."
    def __init__(self, text):
        super().__init__()
        self.ids,self.refs = set(),[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k=='id' or (k=='name' and tag=='a'): self.ids.add(v)
            elif k in ('href','src') and v: self.refs.append(v)

def broken_links(site):
    "A line for each link, anchor or picture inside the site at `site` that leads nowhere."
    parsed = {p.resolve():Links(p.read_text(encoding='utf-8')) for p in sorted(Path(site).rglob('*.html'))}
    if not parsed: return [f'{site} has no pages']
    res = []
    for page,links in parsed.items():
        for ref in dict.fromkeys(links.refs):
            u = urlsplit(ref)
            if u.scheme or u.netloc: continue
            target = page if not u.path else (page.parent/unquote(u.path)).resolve()
            if target.is_dir(): target /= 'index.html'
            ok = target.is_file() and target.is_relative_to(Path(site).resolve()) and not u.path.startswith('/')
            if ok and u.fragment and target in parsed: ok = unquote(u.fragment) in parsed[target].ids
            if not ok: res.append(f'{page.relative_to(Path(site).resolve())}: {ref} leads nowhere')
    return res


def main():
    ap = argparse.ArgumentParser(description='README.md and the site in _docs/, from the notebooks')
    ap.add_argument('--pandoc', action='store_true', help='use the pandoc stand-in even where quarto is installed')
    args = ap.parse_args()
    root = HERE.parent
    os.chdir(root)
    cfg = get_config()
    site_url = cfg.doc_host+cfg.doc_baseurl+'/'
    pages = process(root)
    index = next((p for p in pages if p.src.as_posix()==cfg.readme_nb), None)
    if index: write_readme(index, root, site_url)
    out = root/cfg.doc_path.name
    if shutil.which('quarto') and not args.pandoc:
        subprocess.run([Path(sys.executable).parent/'nbdev_docs', '--n_workers', '2'], check=True)
        wrong = []
    else: wrong = write_site(pages, root, out, site_url)
    wrong += broken_links(out)
    print(*wrong, f'{len(pages)} pages in {out.name}/, {len(wrong)} faults; README.md', sep='\n')
    return bool(wrong)

if __name__=='__main__': sys.exit(main())
