"Latency in turns, and reports that stay short, legible and whole."
import json
from html.parser import HTMLParser
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt, pytest, torch
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_rgb
from torch import nn
from fasterfold.fold import BN_Folder
from fasterfold.find import Kept
from fasterfold.plan import FoldPlan,Folded
from fasterfold.cost import Comparison,Latency,compare,count_parameters,latency,model_size
from fasterfold.report import FoldReport,folded_rows,kept_rows,report,rounding

def norms(model): return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

def trained(model):
    "`model` with the norms of a trained one."
    for m in norms(model):
        nn.init.uniform_(m.running_var, 0.5, 2)
        for p in (m.weight,m.bias,m.running_mean): nn.init.normal_(p, 0.5, 0.2)
    return model.eval()

class Stage(nn.Sequential):
    "`n` convolutions with norms; the second also feeds a tanh, so its norm stays."
    def __init__(self, n): super().__init__(*(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(n)))
    def forward(self, x):
        kept = self[1][0](self[0](x))
        x = torch.tanh(kept)+self[1][1](kept)
        for m in list(self)[2:]: x = m(x)
        return x

@pytest.fixture(scope='session')
def deep():
    "A report on 500 norms in ten stages."
    model,sample = trained(nn.Sequential(*(Stage(50) for _ in range(10)))),torch.randn(2,2,3,3)
    folder = BN_Folder()
    folded = folder.fold(model, sample)
    res = report(model, folded, folder.result, {'1 item':sample[:1], 'batch of 2':sample}, seconds=.01)
    res.metrics = dict(valid_loss=(.5,.5), accuracy=(.75,.75), a_metric_with_a_rather_long_name=(1e-9,1.2e-9), none=(None,None))
    return res

def test_parameters_shared_and_frozen():
    a = nn.Linear(3, 3)
    model = nn.Sequential(a, a, nn.Linear(3, 1).requires_grad_(False))
    assert count_parameters(model)==12+4

def test_models_take_turns():
    calls = []
    class Noting(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name,self.drop = name,nn.Dropout()
        def forward(self, x, y=None):
            assert not self.training and not torch.is_grad_enabled() and y is not None
            if calls[-1:]!=[self.name]: calls.append(self.name)
            return self.drop(x)
    models = {k:Noting(k) for k in 'abc'}
    models['b'].drop.eval()
    rng = torch.get_rng_state()
    res = compare(models, dict(x=torch.ones(1), y=torch.ones(1)), seconds=.05)
    n = len(res.base.turns)
    # a round to warm up, a turn forth, and then back and forth: whoever ends a turn begins the next
    assert ''.join(calls)=='abc'+'abc'+('babc'*n)[:2*(n-1)]
    assert all(len(o.turns)==n and o.runs>=n for o in res.values())
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert [(m.training,m.drop.training) for m in models.values()]==[(True,True),(True,False),(True,True)]

def test_a_model_that_fails_is_left_as_it_was():
    class Fails(nn.Dropout):
        def forward(self, x): raise ValueError('no')
    model = Fails()
    with pytest.raises(ValueError): latency(model, torch.ones(1))
    assert model.training and torch.is_grad_enabled()

def test_rounding_tells_right_from_wrong(deep):
    model,x = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))),torch.randn(4,3,9,9)
    right = BN_Folder().fold(model, x)
    r = rounding(model, right, x)
    assert 0<r.folded<=4*r.original+4*torch.finfo(torch.float32).eps*r.scale
    with torch.no_grad(): right[3].bias += 1e-3*r.scale
    assert rounding(model, right, x).folded>100*r.original

def test_rounding_of_a_model_that_insists_on_float32():
    class Insists(nn.Linear):
        def forward(self, x): return super().forward(x.float())
    r = rounding(Insists(2, 2), Insists(2, 2), torch.ones(1,2))
    assert r.original<1e-6<r.folded and 'float64' in str(r) and r.difference>0

def test_rounding_of_a_model_that_refuses_float64():
    class Refuses(nn.Linear):
        def forward(self, x):
            if x.dtype is torch.float64: raise TypeError('no float64 here')
            return super().forward(x)
    r = rounding(Refuses(2, 2), Refuses(2, 2), torch.ones(1,2))
    assert r.original is None and 'float64' not in str(r) and r.difference>0

def test_500_norms_are_a_short_report(deep):
    assert len(deep.to_df())==500 and len(deep.plan.kept)==10
    assert len(folded_rows(deep.plan))==11 and len(kept_rows(deep.plan))==2
    assert sum(int(r[1]) for r in folded_rows(deep.plan)[1:])==490 and kept_rows(deep.plan)[1][1]=='10'
    assert len(str(deep).splitlines())<40 and max(map(len, str(deep).splitlines()))<200
    assert len(deep._repr_html_())<20_000

def test_many_reasons_are_cut_with_a_pointer_to_all(deep):
    plan = FoldPlan([Folded(f'm{i}', [f'c{i}'], 'back') for i in range(40)], [Kept(f'k{i}', f'reason {i}') for i in range(40)])
    for rows in (folded_rows(plan),kept_rows(plan)):
        assert len(rows)==13 and rows[-1][0]=='and 29 more' and sum(int(r[1]) for r in rows[1:])==40
    assert 'to_df()' in kept_rows(plan)[-1][2]

class Beside(nn.Module):
    "A norm added to a convolution of its own input, one before a linear layer, and one after a convolution."
    def __init__(self):
        super().__init__()
        self.first,self.norm = nn.Conv2d(3, 4, 1),nn.BatchNorm2d(4)
        self.conv,self.skip = nn.Conv2d(4, 4, 3, padding=1),nn.BatchNorm2d(4)
        self.last,self.head = nn.BatchNorm1d(4),nn.Linear(4, 2)
    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = (self.conv(x)+self.skip(x)).relu()
        return self.head(self.last(x.mean((2,3))))

def test_headline_says_where_to():
    model,x = trained(Beside()),torch.randn(2,3,5,5)
    folder = BN_Folder()
    folded = folder.fold(model, x)
    line = report(model, folded, folder.result, {}).headline
    assert line=='Folded 3 of 3 normalization layers (1 into layers before them, 1 into layers after them, 1 into layers beside them), none kept.'
    only = lambda ds,kept=0: FoldReport(FoldPlan([Folded(d, ['c'], d) for d in ds], [Kept('k', 'why')]*kept), (1,1), (4,4)).headline
    assert only(['back','back'])=='Folded 2 of 2 normalization layers, none kept.'
    assert only(['forward'], 1)=='Folded 1 of 2 normalization layers (1 into layers after them), 1 kept.'
    assert only(['beside','beside'])=='Folded 2 of 2 normalization layers (2 into layers beside them), none kept.'
    assert only([], 3)=='Folded 0 of 3 normalization layers, 3 kept.'

def test_text_and_page_say_it_all(deep):
    "Threads, device, runs and ratio of each timing; the largest difference next to the original's own rounding error."
    threads = torch.get_num_threads()
    (lo,hi),r,a,b = deep.latency['1 item'].interval('folded'),deep.rounding,deep.latency['1 item']['original'],deep.latency['1 item']['folded']
    for text in (str(deep),Balance(deep._repr_html_()).text):
        for said in (f"medians on cpu, {threads} thread{'s'*(threads!=1)}", 'latency, 1 item', 'latency, batch of 2', 'valid_loss', 'MB',
            f'{a.runs} → {b.runs} runs', f"between {lo:.2f} and {hi:.2f}×", f'{r.difference:.2g}', f'{r.original:.2g} before', f'{r.folded:.2g} after'):
            assert said in text, said
    assert set(deep.to_df()['direction'])=={'back',''} and deep.to_df()['reason'].str.len().gt(0).sum()==10

def test_peaks_are_shown(deep):
    res = FoldReport(deep.plan, (10,8), (40,32), memory={'1 item':(3*2**20,2*2**20)})
    assert 'peak memory, 1 item 3.00 MB 2.00 MB -33.33 %' in ' '.join(str(res).split())
    assert json.loads(res.to_json())['memory']=={'1 item':dict(before=3*2**20, after=2*2**20)}

def timed(**times):
    "A comparison of models that took these milliseconds in each of ten turns."
    return Comparison((k, Latency(k, [[t/1000] for t in ts], 1, 'cpu')) for k,ts in times.items())

@pytest.fixture(scope='module')
def three(deep):
    "A report on a model that was left with another memory format."
    plan = FoldPlan(deep.plan.folded[:3], format='channels_last')
    one,batch = timed(original=[8]*10, folded=[6]*10, channels_last=[4]*10),timed(original=[40]*10, folded=[39]*5+[42]*5, channels_last=[30]*10)
    return FoldReport(plan, (10,8), (2**21,2**20), {'1 item':one, 'batch of 9':batch}, {'1 item':(2**22,2**21)}, dict(accuracy=(.5,.5)))

def test_a_column_for_each_step(three):
    head,_,*rows = str(three).split('\n\n')[1].splitlines()
    assert head.split()==['original','folded','change','channels_last','change']
    rows = [' '.join(o.split()) for o in rows]
    assert rows[:3]==['parameters 10 8 -20.00 % 8 -20.00 %', 'size 2.00 MB 1.00 MB -50.00 % 1.00 MB -50.00 %', 'peak memory, 1 item 4.00 MB 2.00 MB -50.00 %']
    assert rows[3]=='latency, 1 item 8.00 ms 6.00 ms 0.75× 4.00 ms 0.50× folded between 0.75 and 0.75×, channels_last between 0.50 and 0.50×'
    assert rows[5]=='accuracy 0.5 0.5 same' and 'all three timed in turns' in str(three)
    assert [(f.before,f.folded,f.after) for f in three.figures[3:5]]==[(.008,.006,.004),(.04,.0405,.03)]
    page = Balance(three._repr_html_()).text
    for said in ('channels_last','0.75×','0.50×','10 → 10 → 10 runs'): assert said in page

def test_noise_is_called_noise(three):
    "Where a ratio may as well be 1, none is shown; and those shown are those of the medians beside them."
    f = three.figures[4]
    assert (f.by_folding,f.change,f.note)==('none measured','0.75×','folded between 0.97 and 1.05×, channels_last between 0.75 and 0.75×')
    two = FoldReport(FoldPlan(), (1,1), (4,4), {'1 item':timed(original=[1]*5+[3]*5, folded=[2]*10)})
    assert (two.figures[2].change,two.figures[2].note)==('none measured','between 0.67 and 2.00×') and 'both models timed' in str(two)
    fig = two.plot()
    assert fig.axes[0].get_title()=='latency, 1 item: no difference measured'
    plt.close(fig)

@given(st.lists(st.tuples(*[st.lists(st.floats(1e-6, 10), min_size=1, max_size=5)]*2), min_size=1, max_size=10))
@settings(max_examples=200)
def test_numbers_beside_each_other_agree(turns):
    a,b = (Latency(k, [o[i] for o in turns], 1, 'cpu') for i,k in enumerate('ab'))
    lo,hi = b.interval(a)
    assert lo<=b.ratio(a)==b.median/a.median<=hi and lo<=sorted(b.ratios(a))[len(turns)//2]<=hi

def test_a_format_that_was_not_kept_has_no_column(three):
    res = FoldReport(FoldPlan(three.plan.folded), (10,8), (40,32), three.latency)
    assert res._columns==['original','folded'] and 'channels_last' not in str(res)+res._repr_html_()
    js = json.loads(res.to_json())
    assert js['format'] is None and js['formats']['1 item']==dict(contiguous=.006, channels_last=.004) # but all that was measured is there
    assert json.loads(three.to_json())['format']=='channels_last'

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_peak_memory_on_a_gpu():
    model,x = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).cuda(),torch.randn(64,3,66,66, device='cuda')
    folder = BN_Folder()
    res = report(model, folder.fold(model, x), folder.result, {'batch of 64':x}, seconds=.01)
    before,after = res.memory['batch of 64']
    out = 64*8*64*64*4
    assert before>=model_size(model)+2*out and after>=out # the norm has its input and its output at once
    assert 'peak memory, batch of 64' in str(res)

def test_nothing_to_fold():
    model = nn.Linear(2, 2)
    res = FoldReport(BN_Folder().plan(model, torch.ones(1,2)), (6,6), (24,24))
    assert 'nothing to fold' in str(res) and 'nothing to fold' in res._repr_html_() and len(res.to_df())==0
    plt.close(res.plot())
    assert json.loads(res.to_json())['norms']==dict(found=0, folded=0, merged=0, kept=0)

class Balance(HTMLParser):
    "Checks that tags open and close in pairs."
    def __init__(self, page):
        super().__init__()
        self.open,self.links,self.text = [],[],''
        self.feed(page)
        self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.links += [v for k,v in attrs if k in ('src','href','xlink:href')]
        if tag not in ('meta','br'): self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.links += [v for k,v in attrs if k in ('src','href','xlink:href')]
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.text += data

def test_page_is_whole_and_needs_nothing_else(deep, tmp_path):
    page = Balance(deep.save(tmp_path/'report.html').read_text(encoding='utf8'))
    assert all(o.startswith('#') for o in page.links)
    assert '9.49.1' in page.text and '500 norms' in page.text
    Balance(deep._repr_html_())

def test_names_are_escaped(deep):
    res = FoldReport(FoldPlan([], [Kept('<b>', 'a < b & c')]), (1,1), (4,4), metrics={'<i>':(1,1)})
    assert '<i>' in Balance(res._repr_html_()).text and '<b>' in Balance(res._repr_html_()).text

def test_saving_is_all_or_nothing(deep, tmp_path, monkeypatch):
    path = tmp_path/'report.html'
    path.write_text('old')
    def full(*args): raise OSError('disk full')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(OSError): deep.save(path)
    assert path.read_text()=='old' and [o.name for o in tmp_path.iterdir()]==['report.html']
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError): deep.save(tmp_path/'nowhere'/'report.html')
    assert not plt.get_fignums()

def test_json_has_every_number(deep):
    res = json.loads(deep.to_json())
    assert res['norms']==dict(found=500, folded=490, merged=0, kept=10) and len(res['layers'])==500
    one = res['latency']['1 item']
    assert one['original']['ratio']==1 and one['folded']['runs']==len(one['folded']['times'])>0
    assert one['folded']['threads']==torch.get_num_threads() and one['folded']['device']=='cpu'
    assert res['metrics']['none']==dict(before=None, after=None) and res['metrics']['accuracy']==dict(before=.75, after=.75)
    assert set(res['rounding'])=={'difference','original','folded','scale'} and res['parameters']['after']<res['parameters']['before']

def luminance(c):
    r,g,b = (v/12.92 if v<=.04045 else ((v+.055)/1.055)**2.4 for v in to_rgb(c))
    return .2126*r+.7152*g+.0722*b

def contrast(a, b):
    "As the Web Content Accessibility Guidelines define it."
    hi,lo = sorted((luminance(a),luminance(b)), reverse=True)
    return (hi+.05)/(lo+.05)

@pytest.mark.parametrize('style', ['default','dark_background'])
@pytest.mark.parametrize('name', ['deep','three'])
def test_picture_is_legible_and_nothing_is_clipped(name, style, request):
    with plt.style.context(style):
        fig = request.getfixturevalue(name).plot()
        fig.canvas.draw()
        drawn,page,back = fig.get_tightbbox(),fig.get_size_inches(),fig.get_facecolor()
        assert drawn.x0>=0 and drawn.y0>=0 and drawn.x1<=page[0] and drawn.y1<=page[1]
        texts = [t for t in fig.findobj(plt.Text) if t.get_text().strip()]
        assert len(texts)>20
        for t in texts: assert contrast(t.get_color(), back)>4.5, t
        for bar in fig.findobj(plt.Rectangle):
            if bar.get_label()=='_nolegend_' and bar.get_height()==.32: assert contrast(bar.get_facecolor(), back)>3
        plt.close(fig)

def test_norms_of_merged_branches_are_counted():
    timm = pytest.importorskip('timm')
    model,x = trained(timm.create_model('fastvit_t8')),torch.randn(2,3,64,64)
    folder = BN_Folder(merge_branches=True)
    n = folder.plan(model, x).counts['found'] # scales of layers are norms, too
    assert n>=len(norms(model))
    folded = folder.fold(model, x)
    res,merged = report(model, folded, folder.result, {}),[k for ns in folder.result.merged.values() for k in ns]
    assert set(merged)<={k for k,_ in model.named_modules()} and not {k for k,m in folded.named_modules() if m in norms(folded)}
    assert folder.result.counts==dict(found=n, folded=n-len(merged), merged=len(merged), kept=0) and merged
    assert res.headline.startswith(f'Folded {n} of {n} normalization layers (') and f'{len(merged)} with branches that were merged' in res.headline
    assert f'The branches of {len(folder.result.merged)} blocks were merged' in str(res) and 'merged' in str(folder.result)
    assert sum(int(r[1]) for r in folded_rows(res.plan)[1:])==n and (res.to_df()['result']=='merged').sum()==len(merged)
    plt.close(res.plot())

def test_branches_that_must_not_be_merged_are_said_so(monkeypatch):
    timm = pytest.importorskip('timm')
    model,x = trained(timm.create_model('repvgg_a0')),torch.randn(2,3,64,64)
    import fasterfold.fold as room
    real = room.merge_blocks
    def wrong(m):
        real(m)
        with torch.no_grad(): m.stem.reparam_conv.bias.add_(1)
    monkeypatch.setattr(room, 'merge_blocks', wrong)
    folder = BN_Folder(merge_branches=True)
    folder.fold(model, x)
    assert not folder.result.merged and 'Branches are not merged: the model would compute something else.' in folder.result.notes

def test_files_are_known_by_their_endings(deep, tmp_path):
    assert json.loads(deep.save(tmp_path/'a.json').read_text())==json.loads(deep.to_json())==deep.to_dict()
    assert deep.save(tmp_path/'a.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='a.txt'): deep.save(tmp_path/'a.txt')
    assert sorted(o.name for o in tmp_path.iterdir())==['a.json','a.png'] and not plt.get_fignums()
