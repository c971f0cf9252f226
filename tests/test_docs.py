"The site, opened in a browser, and the examples in README, pages and docstrings."
import ast, doctest, functools, http.server, importlib, inspect, json, re, subprocess, sys, threading
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
    order = [to.index(p) for p in ('tutorials/01_vision.html','tutorials/06_training.html','how_it_works.html','limits.html','results.html','00_affine.html','rules/00_core.html','05_find.html','17_cli.html','changelog.html')]
    assert order==sorted(order)

# Contrast of all visible text with what is behind it, and whether anything sticks out to the right.
_look = r'''(() => {
  const rgba = s => { const m = s.match(/[\d.]+/g).map(Number); return s.startsWith('color(srgb') ? [m[0]*255,m[1]*255,m[2]*255,m[3]??1] : [m[0],m[1],m[2],m[3]??1] }
  const over = (a, b) => [0,1,2].map(i => a[i]*a[3] + b[i]*(1-a[3])).concat(1)
  const lum = c => { const [r,g,b] = c.slice(0,3).map(v => (v/=255)<=.03928 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r+.7152*g+.0722*b }
  const behind = el => { const layers = []; for (let e = el; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((b, a) => over(a, b), getComputedStyle(document.documentElement).colorScheme.includes('dark') ? [18,18,18,1] : [255,255,255,1]) }
  const bad = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const t = walk.currentNode, el = t.parentElement
    if (!t.data.trim() || !el.checkVisibility({opacityProperty:true, visibilityProperty:true}) || el.closest('script,style,noscript,.visually-hidden,title,.sd-octicon,svg')) continue
    let op = 1; for (let e = el; e; e = e.parentElement) op *= getComputedStyle(e).opacity
    const bg = behind(el), c = rgba(getComputedStyle(el).color), fg = over([c[0],c[1],c[2],c[3]*op], bg)
    const [hi,lo] = [lum(fg),lum(bg)].sort((a,b) => b-a), ratio = (hi+.05)/(lo+.05)
    if (ratio<4.5) bad.push(ratio.toFixed(1)+' '+t.data.trim().slice(0,40))
  }
  const broken = [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)
  return {bad:[...new Set(bad)], broken, wide:document.documentElement.scrollWidth - innerWidth}
})()'''

@pytest.mark.parametrize('width,theme', [(1280,'light'),(390,'dark'),(1280,'dark'),(390,'light')])
def test_pages_in_browser(site, url, page, width, theme):
    "Every page: nothing red in the console, nothing from elsewhere, images there, text legible, nothing sticking out."
    page.size(width, 900)
    page.theme(theme)
    wrong = {}
    for p in pages(site):
        page.open(url+p)
        seen = page.ask(_look)
        assert page.ask("document.body.innerText.length")>50
        outside = [r for r in page.requests if not r.startswith((url,'data:'))]
        res = page.errors+seen['bad']+seen['broken']+outside+([f"{seen['wide']} pixels too wide"] if seen['wide']>1 else [])
        if res: wrong[p] = res
    assert not wrong, json.dumps(wrong, indent=1)

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

def test_search(url, page):
    page.open(url+'search.html?q=BN_Folder')
    page.wait("document.querySelectorAll('#search-results li').length>0")
    assert any('11_fold' in h for h in page.ask("[...document.querySelectorAll('#search-results li a')].map(a => a.href)"))

def test_code_links(site):
    "Names in code lead to their documentation."
    text = (site/'tutorials'/'01_vision.html').read_text(encoding='utf-8')
    assert 'href="../11_fold.html#api-BN_Folder"' in text and 'href="../15_learner.html#api-Learner.fold"' in text

def test_api_is_documented(site):
    "Each public name has its place in the reference."
    import pages as p
    missing = [k for k,(where,_) in p.api_names().items() if f'id="{p.anchor(k)}"' not in (site/f'{where}.html').read_text(encoding='utf-8')]
    assert p.api_names() and not missing

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

@pytest.mark.parametrize('f,head,rows', [(several,'several(*names, many=False)',['`*names: str` | Their names','`many: bool` | More than one?']),
    (strict,'strict(a, /, b=(1, 2), *, c=3, **more)',['`a` | First','`b: tuple` | Second','`c: int` | Third','`**more` | Others']),
    (delegates(strict)(given),'given(x, *, b=(1, 2), c=3)',['`x` | What','`b` | Second','`c` | Third'])], ids=['several','strict','delegated'])
def test_signatures_are_in_order(f, head, rows):
    "Each argument with its star, in the order in which Python takes them, and with its comment."
    with_nbdev()
    import pages
    text = pages.document(f.__name__, ast.parse(inspect.getsource(f)).body[0], f)
    assert f'```python\n{head}\n```' in text
    assert re.findall(r'^\| (`.*) \|$', text, re.M)==rows

def test_rules_read_as_what_they_are(site):
    text = re.sub('<[^>]+>', '', (site/'rules'/'00_core.html').read_text(encoding='utf-8'))
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
    text = results.page(tmp_path)
    for said in ('Folding first helps: net (1).','| 10 | 2 s | 1 s | 0.50× | 50 ms |','a processor, 2 threads','| net | 1 | 2 ms | 0.50× | fails |','| net | 8 | 3 | 100 ms | 0.90 |','0.90 with a batch of 8'): assert said in text
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
