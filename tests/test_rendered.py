"Reports and plans as notebooks show them: in the styles of JupyterLab and VS Code, light and dark, and of the classic notebook, on a wide screen and on a phone."
import pytest
from fasterfold.find import Kept
from fasterfold.plan import FoldPlan, Folded
import browser
from test_docs import _look, page # a fixture, chkstyle: ignore
from test_report import deep, three # chkstyle: ignore

nbconvert = pytest.importorskip('nbconvert', reason='notebooks are made into pages with nbconvert, which is no requirement of the tests')
nbf = pytest.importorskip('nbformat').v4
pytestmark = [pytest.mark.xdist_group('site'), pytest.mark.skipif(browser.binary() is None, reason='there is no Chromium here: apt-get install chromium')]

def many():
    "A plan with 60 norms that stay for one reason, and one that stays for another."
    kept = [Kept(f'blocks.{i}.norm', f'`blocks.{i}.act` (Sigmoid) does not let a scale pass') for i in range(60)]+[Kept('last', 'it did not run on the sample')]
    return FoldPlan([Folded(f'stem.{i}', [f'stem.{i}.conv'], 'back') for i in range(3)], kept, notes=['`stem` returns other values than before.'])

def notebook(*shown):
    def cell(o): return nbf.new_code_cell('o', outputs=[nbf.new_output('execute_result', data={'text/html':o._repr_html_()}, execution_count=1)])
    return nbf.new_notebook(cells=[cell(o) for o in shown])

# All that is in our outputs: borders of cells, text that touches or is cut off, and whether the columns that say most are seen
_ours = '''(() => {
  const px = v => parseFloat(v), seen = el => { const r = el.getBoundingClientRect(); return r.width>0 && r.left>=0 && r.right<=innerWidth+1 }
  const cells = [...document.querySelectorAll('.fasterfold :is(td,th)')].filter(o => o.checkVisibility())
  const style = cells.map(o => getComputedStyle(o)), tables = [...document.querySelectorAll('.fasterfold :is(table,thead,tr)')].map(o => getComputedStyle(o))
  return {
    cells: cells.length,
    lines: style.filter(s => px(s.borderTopWidth)+px(s.borderLeftWidth)+px(s.borderRightWidth)>0 || px(s.borderBottomWidth)>1).length,
    striped: tables.filter(s => s.backgroundColor!='rgba(0, 0, 0, 0)').length,
    ticks: [...document.querySelectorAll('.fasterfold')].some(o => o.innerText.includes('`')),
    hidden: [...document.querySelectorAll('.fasterfold td[data-label=change]')].filter(o => o.innerText && !seen(o)).length,
    changes: document.querySelectorAll('.fasterfold td[data-label=change]').length,
    touching: cells.filter((o, i) => cells[i+1] && o.nextElementSibling==cells[i+1] && o.innerText && cells[i+1].innerText && !o.querySelector("details")
      && (a => (b => b.left<a.right+4 && b.top<a.bottom && a.top<b.bottom)((r => (r.selectNodeContents(cells[i+1]), r.getBoundingClientRect()))(document.createRange())))
      ((r => (r.selectNodeContents(o), r.getBoundingClientRect()))(document.createRange()))).map(o => o.innerText),
  }
})()'''

def in_vscode(shown, theme):
    "Outputs in VS Code, whose notebooks are no templates: with what its `backLayerWebView.ts` says of tables, and colours of its default themes."
    back,ink = dict(light=('#ffffff','#3b3b3b'), dark=('#1f1f1f','#cccccc'))[theme]
    style = f"""body {{background:{back}; color:{ink}; font:13px sans-serif}}
table,thead,tr,th,td,tbody {{border:none !important; border-collapse:collapse}} table,th,tr {{vertical-align:middle; text-align:right}}
thead {{font-weight:bold; background-color:rgba(130,130,130,.16)}} th,td {{padding:4px 8px}} tr:nth-child(even) {{background-color:rgba(130,130,130,.08)}}"""
    outputs = ''.join(f'<div style="overflow-x:auto">{o._repr_html_()}</div>' for o in shown)
    return f'<!doctype html><meta name="viewport" content="width=device-width"><style>{style}</style><body class="vscode-{theme}">{outputs}'

@pytest.mark.parametrize('template,theme', [('lab','light'),('lab','dark'),('classic','light'),('vscode','light'),('vscode','dark')])
@pytest.mark.parametrize('width', [1280,414])
def test_outputs_of_a_notebook(page, deep, three, tmp_path, template, theme, width):
    shown = deep,three,three.plan,many()
    if template=='vscode': html = in_vscode(shown, theme)
    else: html,_ = nbconvert.HTMLExporter(template_name=template, **(dict(theme=theme) if template=='lab' else {})).from_notebook_node(notebook(*shown))
    path = tmp_path/'notebook.html'
    path.write_text(html, encoding='utf-8')
    page.size(width, 900)
    page.theme(theme)
    page.open(f'file://{path}')
    page.ask("document.querySelectorAll('.jp-InputArea, .jp-OutputPrompt, .prompt, .input, .anchor-link').forEach(o => o.remove())") # theirs
    ours = page.ask(_ours)
    assert ours['cells']>100 and ours['changes']>10
    assert {k:ours[k] for k in ('lines','striped','ticks','hidden','touching')}==dict(lines=0, striped=0, ticks=False, hidden=0, touching=[])
    assert not page.ask(_look)

def test_equal_reasons_are_one_line_that_opens(page, tmp_path):
    path = tmp_path/'plan.html'
    path.write_text(f'<!doctype html>{many()._repr_html_()}', encoding='utf-8')
    page.size(1280, 900)
    page.open(f'file://{path}')
    assert page.ask("document.querySelectorAll('tbody tr').length")==3+2 and '60 norms' in page.ask('document.body.innerText')
    assert 'blocks.59.norm' not in page.ask('document.body.innerText')
    page.ask("document.querySelector('summary').click()")
    assert 'blocks.59.norm' in page.ask('document.body.innerText')

@pytest.mark.parametrize('theme', ['light','dark'])
@pytest.mark.parametrize('width', [1280,414])
def test_a_saved_report(page, three, tmp_path, theme, width):
    page.size(width, 900)
    page.theme(theme)
    page.open(f"file://{three.save(tmp_path/'report.html')}")
    assert not page.ask(_look) and not page.errors
    assert page.ask("document.querySelector('svg').getBoundingClientRect().width")<=width
