"The site, opened in a browser, and the examples in README, pages and docstrings."
import ast, doctest, functools, http.server, importlib, inspect, json, re, subprocess, sys, threading
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin
import nbformat, pytest
from fastcore.meta import delegates
import browser

pytestmark = pytest.mark.xdist_group('site') # which is built once
root = Path(__file__).resolve().parent.parent
docs = root/'docs'
sys.path.insert(0, str(docs))
def with_nbdev(): pytest.importorskip('nbdev', reason='the site is built with nbdev, which is no requirement of the tests, and needs a newer fastcore than the oldest fastai has')

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The built site; building fails on any warning."
    with_nbdev()
    out = tmp_path_factory.mktemp('site')
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', f"import sys; sys.path.insert(0, {str(docs)!r}); import build; from pathlib import Path; sys.exit(build.build(Path({str(out)!r})))"],
        capture_output=True, text=True, cwd=root)
    assert res.returncode==0, res.stdout[-3000:]+res.stderr[-3000:]
    return out/'html'

@pytest.fixture(scope='session')
def url(site):
    "The site's address while it is served."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture(scope='session')
def page():
    if browser.binary() is None: pytest.skip('there is no Chromium here: apt-get install chromium')
    with browser.chromium() as p: yield p

def pages(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if '_static' not in p.parts)

class Links(HTMLParser):
    "Addresses that a page links to or shows, and the places that can be linked to."
    def __init__(self, text):
        super().__init__()
        self.to,self.ids = [],set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if 'id' in d: self.ids.add(d['id'])
        if (to := d.get('src') if tag in ('img','script') else d.get('href') if tag in ('a','link') else None): self.to.append(to)

def test_no_broken_links(site):
    all = {p:Links((site/p).read_text(encoding='utf-8')) for p in pages(site)}
    broken,n = [],0
    for p,l in all.items():
        for to in l.to:
            if re.match('[a-z]+:', to): continue
            target,frag = urldefrag(urljoin('/'+p, to))
            target,frag = unquote(target.split('?')[0]).lstrip('/') or p,unquote(frag)
            n += 1
            if not (site/target).is_file() or frag and target in all and frag not in all[target].ids: broken.append(f'{p} → {to}')
    assert n>100 and not broken

def test_reading_order(site):
    "All pages are in the sidebar, home first, tutorials in order."
    to = [o for o in Links((site/'index.html').read_text(encoding='utf-8')).to if o.endswith('.html')]
    inner = [p for p in pages(site) if p not in ('index.html','search.html','genindex.html','py-modindex.html')]
    assert set(inner)<=set(to)
    order = [to.index(p) for p in ('tutorials/01_vision.html','tutorials/06_training.html','how_it_works.html','limits.html','results.html','api/index.html','api/learner.html','api/fold.html','api/internals.html','api/affine.html',
        '00_affine.html','rules/00_core.html','05_find.html','17_cli.html','changelog.html')]
    assert order==sorted(order)

# Contrast of all visible text with what is behind it, images that are not there, and whether anything sticks out to the right.
_look = r'''(() => {
  const rgba = s => { const m = s.match(/[\d.]+/g).map(Number); return s.startsWith('color(srgb') ? [m[0]*255,m[1]*255,m[2]*255,m[3]??1] : [m[0],m[1],m[2],m[3]??1] }
  const over = (a, b) => [0,1,2].map(i => a[i]*a[3] + b[i]*(1-a[3])).concat(1)
  const lum = c => { const [r,g,b] = c.slice(0,3).map(v => (v/=255)<=.03928 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r+.7152*g+.0722*b }
  const ground = getComputedStyle(document.documentElement).colorScheme.includes('dark') && matchMedia('(prefers-color-scheme: dark)').matches ? [18,18,18,1] : [255,255,255,1]
  const known = new Map([[null, {bg:ground, opacity:1, shown:true}]])
  const of = el => { // what is behind its text, and whether that is to be read
    if (!known.has(el)) { const up = of(el.parentElement), s = getComputedStyle(el)
      known.set(el, {bg:over(rgba(s.backgroundColor), up.bg), opacity:up.opacity*s.opacity, color:s.color, hidden:s.visibility!='visible',
        shown:up.shown && s.display!='none' && !el.matches('script,style,noscript,.visually-hidden,title,.sd-octicon,svg')}) }
    return known.get(el) }
  const bad = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const t = walk.currentNode.data.trim(), o = t && of(walk.currentNode.parentElement)
    if (!o || !o.shown || o.hidden || !o.opacity) continue
    const c = rgba(o.color), fg = over([c[0],c[1],c[2],c[3]*o.opacity], o.bg)
    const [hi,lo] = [lum(fg),lum(o.bg)].sort((a,b) => b-a), ratio = (hi+.05)/(lo+.05)
    if (ratio<4.5) bad.add(ratio.toFixed(1)+' '+t.slice(0,40))
  }
  const broken = [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)
  const wide = [document.documentElement, document.querySelector('.content')].filter(e => e && e.scrollWidth>e.clientWidth).map(e => `${e.scrollWidth-e.clientWidth} pixels too wide`)
  return [...bad, ...broken, ...wide]
})()'''

# The page within itself, as wide as all kinds of screens: much faster than to resize the browser
_narrow = '''(async () => {
  const f = document.createElement('iframe'), loaded = new Promise(r => f.onload = r), wrong = []
  f.style.cssText = 'position:fixed; top:0; left:0; height:900px; border:0; visibility:hidden'
  f.src = location.href
  document.body.append(f)
  await loaded
  for (const w of [360,414,768,1024,1320,1366,1400,1440,1920]) {
    f.style.width = w+'px'
    const d = f.contentDocument
    for (const e of [d.documentElement, d.querySelector('.content')]) if (e && e.scrollWidth>e.clientWidth) wrong.push(`${e.scrollWidth-e.clientWidth} pixels too wide at ${w}`)
  }
  f.remove()
  return wrong
})()'''

def test_pages_in_browser(site, url, page):
    "Every page: nothing red in the console, nothing from elsewhere, images there, text legible in light and dark, nothing sticking out on any screen."
    wrong,both = {},('index.html','tutorials/02_segmentation.html','api/learner.html','15_learner.html','results.html') # one of each kind
    for p in pages(site):
        page.size(1366, 900)
        page.theme('light')
        page.open(url+p)
        assert page.ask("document.body.innerText.length")>50
        res = page.ask(_narrow)
        for width,theme in ((1366,'light'),(414,'dark'),(1366,'dark'),(414,'light'))[:None if p in both else 2]:
            page.size(width, 900)
            page.theme(theme)
            res += [f'{width} {theme}: {o}' for o in page.ask(_look)]
        res += page.errors+[r for r in page.requests if not r.startswith((url,'data:'))]
        if res: wrong[p] = res
    assert not wrong, json.dumps(wrong, indent=1)

def test_too_wide_is_noticed(site, url, page):
    "What the test above looks for is there, if it is there."
    (site/'wide.html').write_text('<!doctype html><body style="background:#fff; color:#bbb"><div style="width:1380px">wide</div>', encoding='utf-8')
    try:
        page.size(1366, 900)
        page.theme('light')
        page.open(url+'wide.html')
        assert page.ask(_look)==['1.9 wide','22 pixels too wide'] and len(page.ask(_narrow))==6
    finally: (site/'wide.html').unlink()

def test_first_screen(url, page):
    "The home page shows a sentence, how to install, code, and the report, before anybody scrolls."
    page.theme('light')
    for width,height in ((1366,768),(414,896)):
        page.size(width, height)
        page.open(url+'index.html')
        tops = page.ask("[...document.querySelectorAll('h1, h1+blockquote, .first .highlight, .first img')].map(e => e.getBoundingClientRect().top)")
        assert len(tops)==5 and tops==sorted(tops) and tops[-1]<height-200
        assert page.ask("document.querySelector('.first').innerText").count('learn.fold()')>=1

def test_outputs_wrap(url, page):
    "What a cell prints is as wide as the page, and looks unlike code."
    page.size(414, 896)
    page.open(url+'tutorials/01_vision.html')
    assert page.ask("[...document.querySelectorAll('.cell_output pre')].every(e => e.scrollWidth<=e.clientWidth)")
    ground = lambda o: page.ask(f"getComputedStyle(document.querySelector('{o} pre')).backgroundColor")
    assert ground('.cell_input')!=ground('.cell_output')

def test_theme_button(url, page):
    "The button goes through dark and light, whatever the system prefers."
    page.size(1280, 900)
    page.theme('light')
    page.open(url+'index.html')
    back = lambda: page.ask("getComputedStyle(document.body).backgroundColor")
    seen = {back()}
    for _ in range(3):
        page.ask("[...document.querySelectorAll('.theme-toggle')].find(b => b.offsetParent).click()")
        seen.add(back())
    page.ask("localStorage.clear()")
    assert len(seen)==2

@pytest.mark.parametrize('asked,wanted', [('BN_Folder','api/fold'), ('fold_bn','api/learner'), ('batchnorm fusion','how_it_works'), ('fuse conv bn','how_it_works'), ('hooks','limits'),
    ('shared weights','limits'), ('onnx','tutorials/04_deployment'), ('quantization','tutorials/04_deployment'), ('uint8','tutorials/08_pixels')])
def test_search(url, page, asked, wanted):
    "What people call things leads to the page about them, among the first."
    page.open(url+f'search.html?q={asked}')
    page.wait("/found|did not match/.test(document.querySelector('#search-results').innerText)")
    page.wait("document.querySelectorAll('#search-results li').length>0")
    assert any(f'{wanted}.html' in h for h in page.ask("[...document.querySelectorAll('#search-results li a')].slice(0, 6).map(a => a.href)"))

def test_code_links(site):
    "Names in code lead to the reference, and from there to where they are made and tried."
    text = (site/'tutorials'/'01_vision.html').read_text(encoding='utf-8')
    assert 'href="../api/fold.html#api-BN_Folder"' in text and 'href="../api/learner.html#api-Learner.fold"' in text
    assert 'href="../15_learner.html#src-Learner.fold"' in (site/'api'/'learner.html').read_text(encoding='utf-8')
    assert 'href="api/learner.html#api-Learner.fold"' in (site/'15_learner.html').read_text(encoding='utf-8')

def test_api_is_documented(site):
    "Each documented name has its place in the reference and in the index; what users call comes first."
    import reference
    names = reference.names()
    at = {o.page:Links((site/f'{o.page}.html').read_text(encoding='utf-8')) for o in names}
    listed = {o for o in Links((site/'api'/'names.html').read_text(encoding='utf-8')).to if '#api-' in o}
    assert len(names)>300 and not [o.name for o in names if f'api-{o.name}' not in at[o.page].ids or f'{o.page[4:]}.html#api-{o.name}' not in listed]
    from fasterfold.all import __all__ as shown
    called = {o.name for o in names if o.public}
    assert {*shown,'Learner.fold','Learner.unfold'}<=called and 'trace' not in called
    text = (site/'api'/'plan.html').read_text(encoding='utf-8')
    assert text.index('id="api-FoldPlan"')<text.index('What follows is')<text.index('id="api-Planner"')

def test_arguments_are_told(site):
    "Of each argument the type, the default and what it is, and an example that ran."
    text = (site/'api'/'learner.html').read_text(encoding='utf-8')
    cells = [re.sub('<[^>]+>', '', o).strip() for o in re.findall('<td.*?</td>', text[text.index('id="api-Learner.fold"'):], re.S)]
    i = cells.index('undo')
    assert cells[i+1:i+3]==['bool','True'] and cells[i+3].startswith('Remember what unfold needs?')
    assert 'cell_output' in text and "'1 of 1 norms fold'" in re.sub('<[^>]+>|&#39;', lambda m: "'"*(m[0][0]=='&'), (site/'api'/'fold.html').read_text(encoding='utf-8'))
    cli = re.sub('<[^>]+>', '', (site/'api'/'cli.html').read_text(encoding='utf-8'))
    assert 'fasterfold verify FILE [FOLDED] [OPTIONS]' in cli and '--uint8' in cli and 'fasterfold export export.pkl -o model.onnx --trust' in cli

def test_sources_are_linked(site):
    "Each page that is made from a file of the repository says where that is, once there is an address."
    import ext
    assert ext.source_links('', 'index')=={}
    links = ext.source_links('https://a.b/c', 'api/rules/core')
    assert links==dict(theme_source_view_link='https://a.b/c/blob/main/nbs/rules/00_core.ipynb', theme_source_edit_link='https://a.b/c/edit/main/nbs/rules/00_core.ipynb')
    assert not ext.source_links('https://a.b/c', 'search') and ext.source_links('https://a.b/c', 'changelog')['theme_source_view_link'].endswith('/CHANGELOG.md')
    url = re.search('^url = *(.*)', (root/'settings.ini').read_text(encoding='utf-8'), re.M)
    text = (site/'tutorials'/'01_vision.html').read_text(encoding='utf-8')
    assert ('edit-this-page' in text)==('view-this-page' in text)==bool(url and url[1])

def test_downloads(site):
    "Each page that teaches comes as a notebook too, which stands alone."
    for p in sorted([*(root/'nbs'/'tutorials').glob('*.ipynb'), *(root/'nbs'/'howto').glob('*.ipynb')]):
        html = site/p.relative_to(root/'nbs').with_suffix('.html')
        file, = [o for o in Links(html.read_text(encoding='utf-8')).to if '_downloads/' in o]
        nb = nbformat.read(html.parent/file, as_version=4)
        nbformat.validate(nb)
        text,code = ('\n'.join(c.source for c in nb.cells if c.cell_type==k) for k in ('markdown','code'))
        assert text.startswith('# ') and not re.search(r'\]\((?![a-z]+:)', text) and code and not re.search(r'^#\||nbdev_export', code, re.M), p

def test_sidebar_without_pages():
    "A section that has no pages yet is left out."
    with_nbdev()
    import build
    assert (':caption: How to' in build.sidebar())==bool([*(root/'nbs'/'howto').glob('*.ipynb')])

def several(
    *names:str, # Their names
    many:bool=False, # More than one?
): "Takes several."
def strict(
    a, # First
    /,
    b:tuple=(1, 2), # Second
    *,
    c:int=3, # Third
    **more, # Others
): "Takes some by place, some by name."
def given(
    x, # What
    **kwargs
): "Hands on what `strict` takes by name."

@dataclass
class Held:
    "Fields."
    a:int # First
    b:list = field(default_factory=list) # Second
    c:str|None = field(default=None, repr=False) # Third
    d:int = field(kw_only=True) # Fourth
    _d:int = 0

@pytest.mark.parametrize('f,head,rows', [(several,'several(*names, many=False)',['`*names` | `str` |  | Their names','`many` | `bool` | `False` | More than one?']),
    (strict,'strict(a, /, b=(1, 2), *, c=3, **more)',['`a` |  |  | First','`b` | `tuple` | `(1, 2)` | Second','`c` | `int` | `3` | Third','`**more` |  |  | Others']),
    (delegates(strict)(given),'given(x, *, b=(1, 2), c=3)',['`x` |  |  | What','`b` | `tuple` | `(1, 2)` | Second','`c` | `int` | `3` | Third']),
    (Held,'Held(a, b=list(), c=None, d)',['`a` | `int` |  | First','`b` | `list` | `list()` | Second',r'`c` | `str \| None` | `None` | Third','`d` | `int` |  | Fourth'])], ids=['several','strict','delegated','fields'])
def test_signatures_are_in_order(f, head, rows):
    "Each argument with its star, in the order in which Python takes them, and with its comment."
    with_nbdev()
    import reference
    text = reference.document(f.__name__, ast.parse(inspect.getsource(f)).body[0], f)
    assert f'```python\n{head}\n```' in text
    assert re.findall(r'^\| (`.*) \|$', text, re.M)==rows

def test_rules_read_as_what_they_are(site):
    text = re.sub('<[^>]+>', '', (site/'api'/'rules'/'core.html').read_text(encoding='utf-8'))
    for f in ('pull','push','push_any','constant','beside'): assert f'\n{f}(*names)\n' in text

def test_math_needs_no_script(site):
    text = (site/'how_it_works.html').read_text(encoding='utf-8')
    assert text.count('<math')>5 and not re.search('<script[^>]*(mathjax|katex)', text, re.I)

def test_readme_figures():
    "The table in the README is that of docs/results."
    import results
    table = results.comparison(results.load(docs/'results'/'zoo.json'))
    assert table in (root/'README.md').read_text(encoding='utf-8'), 'run `make readme`'

def test_results_without_measurements(tmp_path):
    import results
    text = results.page(tmp_path)
    assert 'make zoo' in text and 'make bench' in text

def test_results_page(tmp_path):
    "What the benchmarks write is what the page shows."
    import results
    env = dict(device='a processor', threads=2, python='3.11', releases=dict(torch='2'))
    row = dict(model='net', batch=1, engine='eager', dtype='float32')
    grown = [dict(depth=n, width=n, original=dict(median=n*2e-3), folded=dict(median=n*1e-3), median=n*1e-3) for n in (10,20)]
    rows = [row|dict(variant='original', median=2e-3, ratio=[1,1,1]), row|dict(variant='fasterfold', median=1e-3, ratio=[.4,.5,.6]), row|dict(variant='other', why='it raises')]
    save = lambda name, **kw: (tmp_path/name).write_text(json.dumps(dict(environment=env, depth=grown, width=grown, **kw)))
    rows += [r|dict(engine='engine') for r in rows[:2]]
    save('latency-cpu.json', latency=rows)
    save('fold.json', speed=[dict(model='net', input=[8,3,9,9], norms=3, seconds=dict(fasterfold=dict(median=.1)), ratio=[.8,.9,1])], memory=[])
    again = dict(batches=10, seconds={'with':dict(median=1.), 'without':dict(median=2.)}, ratio=[.4,.5,.6], again=dict(median=.05))
    save('validation.json', validation=[again])
    save('random_folds.json', folds=[dict(code='abc', tried=1200, folded=700, kept=500, over=0)], wrong=[dict(seed=7, why='off')])
    text = results.page(tmp_path)
    for said in ('1,200 random networks','1,200 norms, of which 700 fold','| 7 | off |','Folding first helps: net (1).','| 10 | 2 s | 1 s | 0.50× | 50 ms |','a processor, 2 threads','| net | 1 | 2 ms | 0.50× | fails |','| net | 8 | 3 | 100 ms | 0.90 |','0.90 with a batch of 8'): assert said in text
    assert text.count('<polyline')==2*2+2

def test_long_description():
    "On a package index, links and pictures of the README lead somewhere."
    res = subprocess.run([sys.executable, '-W', 'ignore', 'setup.py', '--quiet', '--long-description'], cwd=root, capture_output=True, text=True)
    text = res.stdout[res.stdout.index('# fasterfold'):]
    assert text.count('](https://')>5 and not re.search(r'\]\((?![a-z]+:|#)', text)

def test_readme_snippets(tmp_path, monkeypatch):
    "The README's Python runs as it stands, on a small learner and a small model."
    blocks = re.findall('```python\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)
    assert len(blocks)==2
    monkeypatch.chdir(tmp_path)
    from fastai.vision.all import ImageDataLoaders, Image, resnet18
    import numpy as np
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/'data'/c).mkdir(parents=True)
        for i in range(6): Image.fromarray(rng.integers(0, 255, (32,32,3), dtype='uint8')).save(tmp_path/'data'/c/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path/'data', valid_pct=.4, seed=0, bs=4, num_workers=0)
    ns = dict(dls=dls)
    exec(blocks[0].replace('resnet18, ', 'resnet18, pretrained=False, ').replace('fine_tune(3)', 'fine_tune(1)'), ns)
    assert (ns['learn'].path/'folded.pkl').exists() and not any('BatchNorm' in type(m).__name__ for m in ns['learn'].model.modules())
    ns = dict(model=resnet18())
    exec(blocks[1], ns)
    assert len(ns['folder'].result.folded)==20 and ns['folded'] is not ns['model']

def test_docstring_examples():
    "Examples in docstrings give what they say, and the main entry points have some."
    seen = set()
    for p in sorted((root/'fasterfold').rglob('[!_]*.py')):
        mod = importlib.import_module('.'.join(p.relative_to(root).with_suffix('').parts))
        res = doctest.testmod(mod)
        assert not res.failed, p
        examples = {t.name.partition(mod.__name__+'.')[2]:len(t.examples) for t in doctest.DocTestFinder().find(mod) if t.examples}
        assert res.attempted==sum(examples.values())
        seen |= set(examples)
    assert {'Affine','BN_Folder','BN_Folder.plan','count_parameters','compare'}<=seen

def test_tutorials_keep_outputs():
    for p in sorted(p for k in ('tutorials','howto') for p in (root/'nbs'/k).glob('*.ipynb')):
        shown = [c for c in nbformat.read(p, as_version=4).cells if c.cell_type=='code' and not c.source.startswith('#| hide')]
        assert sum(bool(c.outputs) for c in shown)>len(shown)/3, p.name
        assert not any(o.output_type=='error' for c in shown for o in c.outputs), p.name
