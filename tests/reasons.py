"""Is the reason true for which a norm stays?

Each reason has a form, and for each form it says here what must hold of the trace. What a reason names must be there, and where a map could get
to: behind the norm if it says why the norm does not go back, ahead of it if it says why not forward. A reason of another form fails the test.
"""
import re
from collections import namedtuple
from functools import cached_property,wraps
from math import prod
from weakref import WeakKeyDictionary
from torch import jit,strided
from fasterfold.find import norm_call
from fasterfold.rules import PULL,PUSH,Context
from fasterfold.state import overlapping
from fasterfold.trace import Value,user_hooks

Side = namedtuple('Side', 'values ops') # what lies on one side of a norm, up to the next weights

class Around:
    "What a trace has around a norm, when the norms in `plan` are gone: a value is then what its norm read."
    def __init__(self, graph, plan, name):
        self.graph,self.plan,self.name = graph,plan,name
        self.calls = [c for c in graph.calls if (c.name or '')==name]
        self.own = {o for c in self.calls for o in c.all_ops()}
        gone = [c for c in graph.calls if c.module in plan.removed]
        self.gone,self.pairs = {o for c in gone for o in c.ops},[(n.x,n.y) for n in map(norm_call, gone)]
        self.root,self.members = {y:x for x,y in self.pairs},{}
        for x,y in self.pairs: self.members.setdefault(self.rep(x), []).append(y)

    def rep(self, v):
        while v in self.root: v = self.root[v]
        return v
    def same(self, v): return v,*self.members.get(v, ())
    def users(self, v): return [o for m in self.same(v) for o in m.users if o not in self.gone]
    @cached_property
    def norms(self): return [n for n in map(norm_call, self.calls) if n is not None]
    @cached_property
    def maps(self): return [n.affine(Context(self.plan.edits)) for n in self.norms]
    @property
    def falls(self): return any((a.scale<0).any() for a in self.maps)
    @property
    def module(self): return self.calls[0].module

    def made_from(self, todo, passes):
        "Values behind those in `todo`, through operations that pass a map on, and through all that compute weights."
        seen = set()
        while todo:
            v = self.rep(todo.pop())
            if v in seen: continue
            seen.update(self.same(v))
            if v.op is not None: todo += [u for u in v.op.inputs if u.const or u.kind=='outside' or passes(v.op)]
        return seen
    @cached_property
    def back(self):
        values = self.made_from([n.x for n in self.norms], lambda o: o.name in PULL and not any(k in o.name for k in ('conv','embedding','norm')))
        return Side(values, {v.op for v in values}-{None}-self.gone)
    @cached_property
    def forward(self):
        values,ops,todo = set(),set(),[n.y for n in self.norms]
        while todo:
            v = self.rep(todo.pop())
            if v in values: continue
            values.update(self.same(v))
            for o in self.users(v):
                ops.add(o)
                if o.name in PUSH and not any(k in o.name for k in ('batch_norm','deform','rnn')) and (o.name!='convolution' or o.args.bias is None):
                    todo += [u for u in o.outs if u is not None]
        weights = self.made_from([v for o in ops for v in o.inputs if v.const], lambda o: True)
        return Side(values|weights, ops|{v.op for v in weights}-{None})

    def clobbers(self, o):
        "Does `o` write to memory that the input and output of the norm would share, and from which something is read later?"
        home,n = {v.store for k in self.norms for v in (k.x,k.y)},0
        while n!=len(home): n,home = len(home),home.union(*({x.store,y.store} for x,y in self.pairs if {x.store,y.store}&home))
        return home&{*o.writes} and any(v is not None and v.store in home and v.time<o.index<v.last_read for p in self.graph.ops for v in (*p.inputs,*p.outs))

def varies(*vs): return all(isinstance(v, Value) and not v.const for v in vs)
def several(o): return sum(map(varies, o.inputs))>1
def twice(o, n): return len({*map(n.rep, o.inputs)})<len(o.inputs)
def named(*parts): return lambda o,n: any(p in o.name for p in parts)
def lacks(k): return lambda o,n: not isinstance(o.args.get(k), Value) or o.args.get('beta')==0 or 'deform' in o.name and not o.args[k].const
def plain(o): return any(not isinstance(o.args.get(k, o.out), Value) for k in ('self','other')) or abs(o.args.get('alpha', 1))!=1
def picks(o, n): return any(v is not None and (v.users or v.is_output) for v in o.outs[1:])

_odd = named('mul','div','attention') # rules that say no in general words, too
OPS = { # what a reason says of an operation `#`: what must hold of the operation and its `Around`
    "it comes after #": lambda o,n: not o.out.const and (o.name not in PULL or _odd(o, n)),
    "it is followed by #": lambda o,n: o.name not in PUSH or _odd(o, n),
    "it is added to something else in #": lambda o,n: o.name in ('add','sub','rsub') and varies(*o.inputs) or 'add' in o.name and varies(o.args.self),
    "it is multiplied by something else in #": lambda o,n: o.name in ('mul','div') and varies(*o.inputs),
    "it meets #, whose weight is not fixed": lambda o,n: named('conv','mm','rnn')(o, n) and several(o),
    "it reads the positions that # found|# also says which values it picks": picks,
    "not every output of # sees every input": lambda o,n: o.args.transposed,
    r"it comes after a product \(#\), which takes no shift|# multiplies by zero": named('mul','div'),
    r"# takes a number that is no part of the model \(a buffer would be\)": lambda o,n: not o.out.const and plain(o),
    r"# takes it as `(\w+)`": lambda o,n,k: k in [*o.args][1:],
    "# adds values that are scaled differently": lambda o,n: o.name in ('add','sub','rsub') and len(o.inputs)==2,
    "# adds values that the map would change": named('constant_pad'),
    "# adds (?:it to something else|something to it)|# collects a part of it": named('scatter','index_add'),
    "# cannot scale each position differently": named('conv','mm','norm','embedding','unfold','rnn'),
    "# cannot take it up": named('batch_norm'),
    "# computes a weight": lambda o,n: o.out.const,
    "# copies it, and the copies differ": lambda o,n: 'index' in o.name or any(prod(v.shape)<prod(o.out.shape) for v in o.inputs),
    "# crops": lambda o,n: any(k<0 for k in o.args.pad),
    "# divides by it": lambda o,n: o.name=='div' and varies(o.args.other),
    "# does not let a negative scale pass": lambda o,n: named('relu','abs','max','min','median','scatter','std','var')(o, n) and n.falls,
    "# does not let a shift pass": named('relu','abs','avg_pool','grid_sampler','scatter','index_add','std','var','deform'),
    "# does not let a shift pass, since its mask may hide everything": lambda o,n: any(o.args.get(k) is not None for k in ('attn_mask','attn_bias')),
    "# drops some of it at random": lambda o,n: o.args.dropout_p,
    "# has no bias to take the shift": lacks('bias'),
    "# has no weight to take the scale": lacks('weight'),
    "# joins it with what would have to change": lambda o,n: len({*map(n.rep, o.inputs)})>1 or twice(o, n),
    "# joins a value with itself": lambda o,n: o.name in ('cat','stack') and twice(o, n),
    "# joins empty tensors": lambda o,n: any(0 in v.shape or not v.rank for v in o.inputs),
    "# lets no map pass": lambda o,n: 'other' in o.args or not o.args.self.rank,
    "# may select anything": lambda o,n: 'index' in o.name and not all(v.const for v in o.inputs[1:]),
    "# mixes values that are scaled differently": named('pool','sampl','pad','mean','sum','max','min','median','attention','index_add','scatter','std','var'),
    "# multiplies it with itself": lambda o,n: named('mm','attention')(o, n) and several(o),
    "# multiplies what it collects": lambda o,n: o.args.reduce=='prod',
    "# pads with zeros, which are not shifted": lambda o,n: o.name=='convolution' and any(o.args.padding),
    "# picks single numbers": named('index'),
    "# picks by a number of the input": lambda o,n: o.sized,
    "# reads it twice": twice,
    "# rounds": lambda o,n: o.args.rounding_mode,
    "# sums over positions, and their number changes with the size of the input": named('sum'),
    "# takes it from itself": lambda o,n: o.name in ('add','sub','rsub') and twice(o, n),
    "# turns it into integers": lambda o,n: not o.out.dtype.is_floating_point,
    "# keeps too few digits": lambda o,n: o.out.dtype.itemsize==1,
    "# reads it as another type": lambda o,n: o.out.dtype!=o.args.self.dtype,
    "# turns several dimensions": lambda o,n: len(o.args.dims)!=1,
    "# weighs its terms": lambda o,n: o.args.alpha!=1 or o.args.beta not in (0,1)}

def leaf(n, name): return next(v for v in n.graph.leaves if name in v.names)
def lent(n, s, name): return leaf(n, name) in s.values and leaf(n, name)
def owner(n, name): return next(m for m,names in n.graph.modules.items() if name.rpartition('.')[0] in names)
def runs(n, name): return any(name in n.graph.modules.get(c.module, ()) for c in n.graph.calls)
def reads(n, values, label): return any(o.label==label for v in values for o in {*n.users(n.rep(v))}-n.own)
def made_by(s, label): return [v for v in s.values if v.op is not None and v.op.label==label]
def own_statistics(o): return o.args.get('running_mean') is None or o.args.training
def norm_ops(n): return [o for o in n.own if 'batch_norm' in o.name]

_same = "(?:failed verification: the folded model did not compute the same|its fold would be wrong)"
FORMS = { # all other reasons: what must hold of the `Around` and the `Side`
    "the model returns what lies in between": lambda n,s: any(v.is_output and not v.is_leaf for v in s.values),
    "the model returns `([^`]+)`": lambda n,s,w: lent(n, s, w).is_output,
    "`keep` asks for what `([^`]+)` returns": lambda n,s,k: any(v.part==k for v in s.values),
    "(.+) sees what lies in between": lambda n,s,who: any(who in v.hooks for v in s.values),
    r"`([^`]+)` did not run on the sample, and might read what lies in between \(.+\)": lambda n,s,m: not runs(n, m) and m in n.graph.idle,
    "it comes straight from the model's input": lambda n,s: any(v.kind=='input' for v in s.values),
    "# reads a tensor that is no lasting part of the model": lambda n,s,l: any(v.kind in ('outside','absent') and o.label==l for v in s.values for o in v.users),
    "what lies in between is empty on the sample": lambda n,s: any(0 in v.shape for v in s.values),
    "a scale is zero, or so small that rounding would show": lambda n,s: any((a.shift.abs()>=100*a.scale.abs()).any() for a in n.maps),
    "it runs on what it made before": lambda n,s: s.ops&n.own,
    "its input also feeds #": lambda n,s,l: reads(n, [k.x for k in n.norms], l),
    "what # makes also feeds #": lambda n,s,l,m: reads(n, made_by(s, l), m),
    "different maps are wanted of what # makes": lambda n,s,l: made_by(s, l),
    "# writes in place to what is still needed afterwards": lambda n,s,l: any(o.label==l and n.clobbers(o) for o in n.graph.ops),
    "`([^`]+)` is also used by #": lambda n,s,w,l: len(n.users(lent(n, s, w)))>1 and reads(n, [leaf(n, w)], l),
    "`([^`]+)` is used more than once, and different maps are wanted of it": lambda n,s,w: len(n.users(lent(n, s, w)))>1,
    "`([^`]+)` is sparse or nested": lambda n,s,w: lent(n, s, w).nested or lent(n, s, w).tensor.layout is not strided,
    "`([^`]+)` shares its memory with `([^`]+)`": lambda n,s,w,u: leaf(n, w) is not leaf(n, u) and overlapping([leaf(n, w).tensor,leaf(n, u).tensor]),
    "`([^`]+)` is part of TorchScript, of which nothing is edited": lambda n,s,w: isinstance(owner(n, w), jit.ScriptModule),
    "`([^`]+)` is tied to `([^`]+)`, which did not run on the sample": lambda n,s,w,u: lent(n, s, w) is leaf(n, u) and not runs(n, u.rpartition('.')[0]),
    r"it returns (\w+) for (\w+)": lambda n,s,out,x: any((str(c.out.dtype),str(c.ins[0].dtype))==(f'torch.{out}',f'torch.{x}') for c in n.calls),
    "it is no norm each time it runs": lambda n,s: len(n.norms)<len(n.calls) or any(a is None for a in n.maps),
    "its `([^`]+)` is also read by #": lambda n,s,k,l: reads(n, [v for v in n.graph.leaves if v.names[0].rpartition('.')[2]==k and n.own&{*v.users}], l),
    r"a hook \((.+)\) watches it": lambda n,s,h: h in user_hooks(n.module),
    "(?:`([^`]+)`|the model) asks for its `([^`]+)`": lambda n,s,*o: o[-1] in n.graph.asked.get(n.module, ()) and (len(o)==1 or runs(n, o[0])),
    "`([^`]+)` holds it, too, and would still run it": lambda n,s,name: name.rpartition('.')[2] in vars(owner(n, name)),
    "it multiplies by or adds numbers that are not finite": lambda n,s: not all(a.finite for a in n.maps),
    "it is no part of the model": lambda n,s: any(c.name is None for c in n.calls),
    "it is the whole model, and there is nothing around it to fold into": lambda n,s: n.calls[0].parent is None,
    "it did not run on the sample": lambda n,s: not n.calls and any(n.name in names for names in n.graph.modules.values()),
    "it ran on an empty tensor: fold with a sample that fills it": lambda n,s: any(0 in v.shape for c in n.calls for v in c.ins),
    "it is TorchScript, of which nothing is edited": lambda n,s: isinstance(n.module, jit.ScriptModule),
    "it is called with more than its input, which an `nn.Identity` does not take": lambda n,s: any(c.given>1 for c in n.calls),
    r"it is called with `(\w+)=`, which (an `nn.Identity` does|what stays of it need) not take": lambda n,s,k,who: any(c.keys==(k,) and (who[0]=='w' or k!='input') for c in n.calls),
    "it is called by keyword with several tensors or one that is written to": lambda n,s: any(c.keys and len(c.ins)!=1 for c in n.calls),
    "it is not called with one tensor": lambda n,s: any(len(c.ins)!=1 for c in n.calls),
    r"`(\w+).forward` does more than scale and shift each channel of its input": lambda n,s,t: t in {type(c.module).__name__ for c in n.calls},
    r"it returns a `(\w+)`, which nobody saw being made": lambda n,s,t: any(c.out.kind=='outside' and type(c.out.tensor).__name__==t for c in n.calls),
    "it runs no batch normalization of the input": lambda n,s: n.calls and not any(varies(v) for o in norm_ops(n) for v in o.inputs),
    "# computes with a size or number of the input": lambda n,s,l: any(o.sized and o.label==l for o in n.own),
    "`([^`]+)` is not of floating-point numbers": lambda n,s,w: not lent(n, s, w).dtype.is_floating_point,
    "`([^`]+)` is complex": lambda n,s,w: any(v.dtype.is_complex and v.name==w for v in s.values),
    r"`([^`]+)` is not saved in the state_dict \(`persistent=False`\)": lambda n,s,w: lent(n, s, w) and w not in n.calls[0].module.state_dict(),
    r"`batch_norm` is called as a function in `(\w+).forward`, which cannot be edited": lambda n,s,t: t in {type(c.module).__name__ for c in n.calls},
    r"it normalizes with statistics of its input, which change with it(?: \(.+\)|, in eval mode, too)?": lambda n,s: any(map(own_statistics, norm_ops(n))),
    r"`([^`]+)` would overflow (\w+)": lambda n,s,w,dtype: str(leaf(n, w).dtype)==f'torch.{dtype}',
    r"failed verification: (?:the folded model does not run \(.+\)|rounding would put it \S+ off, and the original is \S+ off|rounding would change integers, sizes or overflows of what the model returns)": lambda n,s: True,
    "its fold with these weights is another one, which nobody has proved: call `fold` again": lambda n,s: True,
    rf"{_same}(?: on inputs of [^`]+)?": lambda n,s: True,
    rf"{_same} on inputs of [^`]+, where (?:it ends before|# runs instead of) #": lambda n,s,*ls: any(o.label==ls[-1] for o in n.graph.ops),
    rf"{_same} on inputs of [^`]+, where # runs in the end": lambda n,s,l: True,
    r"its `(\w+)` is not known to be the same for every input": lambda n,s,k: any(varies(o.args[k]) for o in norm_ops(n))}

_op = r"(`[^`]+` \(\w+\)|`[^`]+` in `[^`]+`|`[^`]+`)" # `Op.label`
_forms = [(re.compile(k.replace('#', _op)), f, table is OPS) for table in (OPS,FORMS) for k,f in table.items()]
_hint = re.compile(r" \(`([^`]+)` can merge its branches: try `merge_branches=True`\)$")

def true_of(part, n, side):
    "Is `part` of a reason true? None if it has no known form."
    res = None
    for form,f,of_op in _forms:
        if (m := form.fullmatch(part)) is None: continue
        if of_op:
            label,*rest = filter(None, m.groups())
            res = any(f(o, n, *rest) for o in side.ops|n.own if o.label==label)
        else: res = bool(f(n, side, *[g for g in m.groups() if g is not None]))
        if res: return True
    return res

def check_reason(graph, plan, kept):
    "Assert that the reason of `kept` is true: as a whole, or in two parts, of what is behind the norm and of what is ahead."
    n,text = Around(graph, plan, kept.norm),kept.reason
    if (hint := _hint.search(text)) is not None:
        text = text[:hint.start()]
        assert any(hint[1] in names and {*dir(m)}&{'reparameterize','fuse','switch_to_deploy'} for m,names in graph.modules.items()), kept
    halves = [(text[:m.start()], text[m.end():]) for m in re.finditer(', and ', text)]
    said = [(true_of(text, n, s),) for s in (n.back,n.forward)]+[(true_of(a, n, n.back), true_of(b, n, n.forward)) for a,b in halves]
    said = [all(o) for o in said if None not in o]
    assert said, f"tests/reasons.py does not say when this holds: {text}"
    assert any(said), f"not true of `{kept.norm}`: {text}"

_checked = WeakKeyDictionary() # trace to what was checked

def with_true_reasons(plan_folds):
    "`plan_folds`, with a check of each reason."
    @wraps(plan_folds)
    def checked(graph, exclude=None):
        plan,seen = plan_folds(graph, exclude),_checked.setdefault(graph, set())
        for k in plan.kept:
            if k.reason and (k.norm,k.reason) not in seen: check_reason(graph, plan, k) # none is given while a culprit is looked for
            seen.add((k.norm, k.reason))
        return plan
    return checked
