"`separate_relus`: the same function with one ReLU module a use, in both modes, or one sentence."
import copy, pickle

import pytest, torch
import torch.nn.functional as F
from torch import nn

from qisal.core import BadInput
from qisal.models import separate_relus
from qisal.quant import bake, bit_policy, convert

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def relus(m): return {n: o for n, o in m.named_modules() if type(o) is nn.ReLU}


class Net(nn.Module):
    "Layers `a` and `b`, and whatever `body` makes of them."
    n_out = 6

    def __init__(self, body, **children):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.body = nn.Linear(6, 6), nn.Linear(6, self.n_out), body
        for k, v in children.items(): setattr(self, k, v)

    def features(self): return self.n_out

    def forward(self, x): return self.body(self, x)


def drops(m, x): return m.b(F.dropout(F.relu(m.a(x)), .5, m.training))
def drops_by_keyword(m, x): return m.b(F.dropout(F.relu(m.a(x)), p=.5, training=m.training))
def drops_in_evaluation(m, x): return m.b(F.dropout(F.relu(m.a(x)), .5, not m.training))
def strength(m, x): return m.b(F.dropout(F.relu(m.a(x)), .5 if m.training else 0., True))
def norms(m, x): return m.b(F.relu(F.batch_norm(m.a(x), m.mean, m.var, training=m.training)))


@pytest.mark.parametrize('body', [drops, drops_by_keyword, drops_in_evaluation, strength, norms])
@pytest.mark.parametrize('copied', [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m)))])
@pytest.mark.parametrize('given_in', [True, False])
def test_a_function_that_asks_for_the_mode_keeps_asking(body, copied, given_in):
    m = Net(body)
    m.register_buffer('mean', torch.zeros(6))
    m.register_buffer('var', torch.ones(6))
    s = copied(separate_relus(copy.deepcopy(m).train(given_in)))
    assert s.training is given_in
    for training in (True, False, True):
        res = []
        for o in (m, s):
            torch.manual_seed(1)
            o.train(training)
            res.append(o(X))
        assert torch.equal(*res), training
    assert torch.equal(s.mean, m.mean)


def test_only_what_needs_it_is_rewritten_and_names_stay():
    inner = Net(drops)
    m = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), inner, nn.Sequential(nn.Linear(6, 3)))
    s = separate_relus(m)
    assert type(s) is nn.Sequential and len(s) == 3 and [type(o) for o in (s[0], s[2])] == [nn.Sequential]*2  # what a splitter indexes
    assert isinstance(s[1], Net) and s[1].features() == 6 and type(s[1]).__name__ == 'Net' and type(m[1]) is Net
    assert [n for n, _ in s.named_parameters()] == [n for n, _ in m.named_parameters()]
    assert all(a is b for a, b in zip(s.parameters(), m.parameters()))
    assert list(relus(s)) == ['0.1', '1.relu'] and not any(o.inplace for o in relus(s).values())
    assert m[0][1].inplace and list(relus(m)) == ['0.1']  # the argument is left alone


def test_a_forward_without_relus_may_be_as_it_likes():
    "It can't be traced, or takes another way in training; nobody has to rewrite it."
    def branches(m, x): return m.b(m.block(x)) if x.sum() > 1e9 or m.training else m.b(m.block(x))*1.
    m = Net(branches, block=nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)))
    s = separate_relus(m)
    assert type(s) is Net and list(relus(s)) == ['block.1']
    with torch.no_grad(): assert torch.equal(s(X), m(X))


act = nn.ReLU(inplace=True)
def twice(m, x): return m.b(m.act(m.a(m.act(x))))
def alias(m, x): return m.b(m.again(m.a(m.act(x))))
def rereads(m, x): h = m.a(x); y = m.b(F.relu(h, inplace=True)); return y + h  # noqa: E702
def rereads_module(m, x): h = m.a(x); y = m.b(m.act(h)); return y + h  # noqa: E702
def parts(m, x):
    x = m.a(x)
    for o in m.layers: x = o(x)
    return m.b(x)


@pytest.mark.parametrize('body,children,names', [
    (twice, dict(act=act), ['act', 'act_1']), (alias, dict(act=act, again=act), ['act', 'again']), (rereads, {}, ['relu']), (rereads_module, dict(act=act), ['act']),
    (parts, dict(layers=nn.Sequential(act, nn.Linear(6, 6), act)), ['layers.0', 'layers.2']),
    (parts, dict(layers=nn.ModuleList([act, nn.Linear(6, 6), act])), ['layers.0', 'layers.2'])])
def test_shared_and_in_place(body, children, names):
    m = Net(body, **children)
    s = separate_relus(m)
    for training in (True, False):
        with torch.no_grad(): assert torch.equal(s.train(training)(X.clone()), m.train(training)(X.clone()))
    assert list(relus(s)) == names
    ran = []
    for o in relus(s).values(): o.register_forward_hook(lambda m, *_: ran.append(id(m)))
    with torch.no_grad(): s(X)
    assert len(ran) == len(set(ran)) == len(names)
    c = convert(copy.deepcopy(s), bit_policy('4'), X).eval()
    with torch.no_grad(): assert torch.equal(bake(c)(X), c(X))


def other_way(m, x): return m.b(F.relu(m.a(F.relu(x)))) if m.training else m.b(F.relu(m.a(x)))
def depends(m, x): return m.b(F.relu(m.a(x))) if x.sum() > 0 else x
def noise(m, x): return m.b(F.relu(m.a(x)) + torch.rand(1))
def block_changes_its_input(m, x): h = m.a(x); return m.block(h) + h  # noqa: E702
def counts(m, x):
    m.calls = getattr(m, 'calls', 0) + 1
    return m.b(F.relu(m.a(x)))*m.calls


@pytest.mark.parametrize('body,said', [(other_way, 'Net takes another way in training'), (depends, "Net can't be traced"), (noise, "Net can't be traced.*a tensor of its own"),
                                       (block_changes_its_input, 'Net answers differently'), (counts, "Net can't be traced|Net answers differently")])
def test_what_cannot_be_kept_is_refused(body, said):
    m = Net(body, block=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)))
    before, had = repr(m), {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(BadInput, match=said): separate_relus(m)
    assert repr(m) == before and m.training and all(torch.equal(v, had[k]) for k, v in m.state_dict().items())


def test_comparing_leaves_statistics_and_the_random_state():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    separate_relus(m)
    assert torch.equal(torch.rand(1), want) and m[1].num_batches_tracked == 0 and torch.equal(m[1].running_mean, torch.zeros(4)) and m.training


def test_inputs_that_nobody_can_guess_are_asked_for():
    m = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(75*3, 4))
    with pytest.raises(BadInput, match='give one: separate_relus.model, xb'): separate_relus(m)
    assert not separate_relus(m, torch.randn(2, 2, 77, 5))[2].inplace
