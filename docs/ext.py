"Two things for Sphinx: math as MathML, which browsers draw without a script, and links from names in code to the API"
import posixpath, re
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
import pages

def _inline(self, node):
    self.body.append(convert(node.astext()))
    raise SkipNode
def _block(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode

_name = r'<span class="n(?:c|f|n|b)?">(\w+)</span>'
_dot = r'<span class="o">\.</span>'
_chain = re.compile(f'{_name}(?:{_dot}{_name})?')
_code = re.compile(r'(<div class="highlight[^"]*"><pre>)(.*?)(</pre>)', re.S)
_quoted = re.compile(r'(<code class="docutils literal notranslate"><span class="pre">)([\w.]+)((?:\([^<]*\))?</span></code>)(?!</a>)')

def _link(app, pagename, templatename, context, doctree):
    "Link names of the API in the finished page."
    if not context.get('body') or not doctree: return
    api = app.config.api_names
    own = {k for k,(page,_,home) in api.items() if pagename in (page,home)}
    def anchor(text, key):
        page = api[key][0]
        here = '' if page==pagename else posixpath.relpath(page+'.html', posixpath.dirname(pagename) or '.')
        return f'<a class="api" href="{here}#{pages.anchor(key)}">{text}</a>'
    def known(name, imported): return name in api and (api[name][1] or name in own or name in imported)
    def code(m):
        text = re.sub('<[^>]+>', '', m[2])
        imported = {n.strip() for line in re.findall(r'from fasterfold[\w.]* import ([\w, ]+)', text) for n in line.split(',')} | seen
        seen.update(imported)
        def name(n):
            a,b = n[1],n[2]
            for key in (f'{a}.{b}', *([f'Learner.{b}'] if a=='learn' else []), *([f'BN_Folder.{b}'] if a=='folder' else [])):
                if b and key in api: return anchor(n[0], key)
            return n[0] if not known(a, imported) else n[0].replace(f'>{a}</span>', f'>{anchor(a, a)}</span>', 1)
        return m[1]+_chain.sub(name, m[2])+m[3]
    def quoted(m):
        key = m[2].replace('learn.', 'Learner.')
        return anchor(m[0], key) if key in api and (api[key][1] or key in own or re.search('[.A-Z]', key)) else m[0]
    seen = set()
    context['body'] = _quoted.sub(quoted, _code.sub(code, context['body']))

def source_links(
    url:str, # Of the repository, '' if there is none yet
    page:str, # A page
)->dict: # What the theme makes links of
    "Where to see and to edit what `page` is made from."
    file = pages.source(page)
    return {f'theme_source_{k}_link':f'{url}/{how}/main/{file}' for k,how in (('view','blob'), ('edit','edit'))} if url and file else {}

def _sources(app, pagename, templatename, context, doctree): context.update(source_links(app.config.repository, pagename))

def setup(app):
    app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
    app.add_config_value('api_names', {}, '')
    app.add_config_value('repository', '', 'html')
    app.connect('html-page-context', _sources)
    app.connect('html-page-context', _link)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
