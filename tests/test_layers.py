"What a converted network keeps, what its layers may be, and who writes their weights."
import copy, pickle

import pytest, torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qisal.core import WEIGHT_QUANTIZERS, BadInput
from qisal.models import resnet18, small_cnn
from qisal.quant import (ConversionError, InputQuant, apply_quant_config, bake, bit_policy, convert, pacts, quant_config, quant_layers, quantize_weight, strip)

LO, HI = (0 - .1307)/.3081, (1 - .1307)/.3081


def grid(q): return q.lo, q.hi, q.scale, q.zero_point


def with_grid(lo, hi):
    torch.manual_seed(0)
    return convert(small_cnn(), bit_policy('4'), torch.randn(2, 1, 28, 28), input_range=(lo, hi)).eval()


@pytest.mark.parametrize('cast', [lambda m: m, lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_grid_of_the_image_travels_with_the_state(cast):
    want = LO, HI, (HI - LO)/255, round(-LO/((HI - LO)/255))
    a, b = cast(with_grid(LO, HI)), with_grid(-9., 9.)
    assert grid(a[0].input_quant) == want
    b.load_state_dict(a.state_dict())
    assert grid(b[0].input_quant) == want and all(type(o) in (int, float) for o in grid(b[0].input_quant))
    x = torch.rand(8, 1, 28, 28)*3
    with torch.no_grad(): assert torch.equal(b(x), with_grid(LO, HI).to(a[0].weight.dtype).float()(x))


def test_a_checkpoint_without_a_grid_leaves_it():
    a, b = with_grid(LO, HI), with_grid(-9., 9.)
    b.load_state_dict({k: v for k, v in a.state_dict().items() if 'input_quant' not in k})
    assert (b[0].input_quant.lo, b[0].input_quant.hi) == (-9., 9.)
    b.load_state_dict(small_cnn().state_dict())
    assert (b[0].input_quant.lo, b[0].input_quant.hi) == (-9., 9.)


def test_a_grid_that_was_cast_is_refused():
    state = {k: v.half() for k, v in with_grid(LO, HI).state_dict().items()}
    with pytest.raises(BadInput, match='as it was saved'): with_grid(0, 1).load_state_dict(state)


@pytest.mark.parametrize('lo,hi', [(0, 0), (0, 1e-45), (float('nan'), 1), (0, float('inf')), (0, 1e300)])
def test_a_range_that_is_none(lo, hi):
    q = InputQuant(LO, HI)
    with pytest.raises(BadInput): q.set_range(lo, hi)
    assert (q.lo, q.hi) == (LO, HI)


def test_set_range():
    q = InputQuant(LO, HI)
    q.set_range(-1, 3)
    assert grid(q) == grid(InputQuant(-1, 3)) == (-1, 3, 4/255, 64)


def test_an_image_on_its_grid_can_be_changed_in_place():
    x = torch.rand(2, 5, requires_grad=True)
    InputQuant(0, 1)(x).mul_(2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.))


# --- what counts as a layer ---

X = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


class MyConv(nn.Conv2d): pass
class MyLinear(nn.Linear): pass
class MyReLU(nn.ReLU): pass


def net(conv=None, linear=None, relu=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), conv or nn.Conv2d(4, 4, 3), relu or nn.ReLU(), nn.Flatten(), linear or nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))


def replaced(m):
    m.forward = m.forward
    return m


def hooked(m):
    del m._parameters['weight']
    m.weight = torch.randn(m.out_channels, m.in_channels, *m.kernel_size)
    return m


conv = lambda: nn.Conv2d(4, 4, 3)  # noqa: E731
ODD = dict(subclass=(lambda: net(MyConv(4, 4, 3)), '2 .MyConv. is a subclass of nn.Conv2d'), subclass_linear=(lambda: net(linear=MyLinear(256, 256)), '5 .MyLinear. is a subclass'),
           subclass_relu=(lambda: net(relu=MyReLU()), '3 .MyReLU. is a subclass of nn.ReLU'), weight_norm=(lambda: net(parametrizations.weight_norm(conv())), '2 .*remove_parametrizations'),
           spectral_norm=(lambda: net(parametrizations.spectral_norm(conv())), '2 .*remove_parametrizations'), old_weight_norm=(lambda: net(nn.utils.weight_norm(conv())), '2 .*remove_weight_norm'),
           old_spectral_norm=(lambda: net(nn.utils.spectral_norm(conv())), '2 .*remove_spectral_norm'), pruned=(lambda: net(prune.l1_unstructured(conv(), 'weight', .5)), "2 .*prune.remove.layer, 'weight'"),
           pruned_bias=(lambda: net(prune.l1_unstructured(conv(), 'bias', .5)), "2 .*prune.remove.layer, 'bias'"), forward=(lambda: net(replaced(conv())), '2 .*forward replaced'),
           attribute=(lambda: net(hooked(conv())), "2 .*make 'weight' an nn.Parameter"))


@pytest.mark.parametrize('what', ODD)
def test_an_odd_layer_is_refused_by_name_and_nothing_changes(what):
    make, said = ODD[what]
    m = make()
    before = repr(m)
    with pytest.raises(ConversionError, match=said): convert(m, bit_policy('2'), X)
    assert repr(m) == before and not quant_layers(m) and not pacts(m)


@pytest.mark.parametrize('what', [k for k in ODD if 'relu' not in k and 'linear' not in k])
def test_an_odd_layer_can_be_left_in_float_on_purpose(what):
    m = ODD[what][0]()
    kind = type(m[2])
    convert(m, bit_policy('2'), X, overrides={'2': 32}).eval()
    assert type(m[2]) is kind and list(quant_layers(m)) == ['0', '5', '7']
    with torch.no_grad():
        want = m(X)
        if what != 'attribute': assert torch.equal(bake(m)(X), want)


WAYS_OUT = dict(pruned=lambda m: prune.remove(m, 'weight'), weight_norm=lambda m: nn.utils.parametrize.remove_parametrizations(m, 'weight'),
                old_weight_norm=nn.utils.remove_weight_norm, old_spectral_norm=nn.utils.remove_spectral_norm)


@pytest.mark.parametrize('what', WAYS_OUT)
def test_the_way_out_can_be_gone(what):
    m = ODD[what][0]().eval()
    with torch.no_grad(): want = m(X)
    WAYS_OUT[what](m[2])
    with torch.no_grad(): assert torch.allclose(m(X), want, atol=1e-5)
    assert bake(convert(m, bit_policy('2'), X))[2].weight.unique().numel() <= 4


@pytest.mark.parametrize('after', [lambda m: prune.l1_unstructured(m, 'weight', .5), parametrizations.weight_norm])
def test_what_is_added_after_conversion_is_neither_skipped_nor_overwritten(after):
    m = convert(net(), bit_policy('2'), X)
    after(m[2])
    for f in (bake, strip):
        with pytest.raises(BadInput, match='2 .*computed from other values'): f(m)


def test_a_lazy_layer_is_refused_before_it_takes_a_shape():
    m = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ConversionError, match='1 .LazyLinear. has no weights yet'): convert(m, bit_policy('4'), X)
    assert m[1].has_uninitialized_params()


# --- tied weights ---

def tied():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Flatten(), *(o for _ in range(4) for o in (nn.Linear(144, 144), nn.ReLU())), nn.Linear(144, 5))
    m[5].weight = m[3].weight
    return m


@pytest.mark.parametrize('method', WEIGHT_QUANTIZERS)
def test_a_tied_weight_is_quantized_once(method):
    m = convert(tied(), bit_policy('2'), X, weight_quantizer=method).eval()
    b = bake(m)
    assert b[3].weight is b[5].weight and torch.equal(b[3].weight, quantize_weight(m[3].weight, 2, method))
    with torch.no_grad(): assert torch.equal(b(X), m(X)) and torch.equal(bake(b)(X), m(X))
    assert torch.equal(strip(m)[3].weight, m[3].weight)


def test_tied_layers_of_different_bits_are_refused():
    m = tied()
    m[1].weight = m[3].weight
    with pytest.raises(ConversionError, match='1 and 3 share one weight, but would have 8 and 4 bits') as e: convert(m, bit_policy('4'), X)
    assert not quant_layers(m)
    b = bake(convert(m, bit_policy('4'), X, overrides=eval(str(e.value).split('overrides=')[1].rstrip('.')) | {'5': 8}))  # the way out, taken
    assert b[1].weight is b[5].weight
    m[5].w_bits = 2
    with pytest.raises(ConversionError, match='share one weight'): bake(m)


def test_a_weight_that_something_else_reads_is_refused():
    m = tied()
    m.add_module('other', nn.Identity())
    m.other.register_parameter('copy', m[7].weight)
    with pytest.raises(ConversionError, match='7 .Linear. shares its weight with other.copy'): convert(m, bit_policy('4'), X)


# --- a baked network ---

def test_a_baked_network_is_not_quantized_again():
    m = convert(net(), bit_policy('2'), X).eval()
    b = bake(m)
    with torch.no_grad(): want = b(X)
    with pytest.raises(ConversionError, match='0 is baked.*strip'): convert(b, bit_policy('2'), X)
    with torch.no_grad(): assert torch.equal(b.eval()(X), want)
    again = convert(strip(b), bit_policy('2'), X)  # the way out
    assert all(o.weight.requires_grad for o in quant_layers(again).values())


def test_training_leaves_a_baked_network_on_its_grid():
    m = convert(net(), bit_policy('2'), X)
    built = apply_quant_config(net(), quant_config(bake(m)))
    built.load_state_dict(bake(m).state_dict())
    for b in (bake(m), built):
        opt = torch.optim.SGD(b.parameters(), 1.)
        b.train()(X).square().mean().backward()
        opt.step()
        assert [o.weight.unique().numel() <= 4 for o in (b[2], b[5])] == [True, True]
        assert not torch.equal(b[2].bias, m[2].bias)


# --- what reads the image ---

@pytest.mark.parametrize('first', [[nn.Flatten()], [nn.AvgPool2d(2), nn.Flatten()], [nn.MaxPool2d(2), nn.Flatten()], [nn.AdaptiveAvgPool2d(4), nn.Flatten()], [nn.Dropout(), nn.Identity(), nn.Flatten()]])
def test_the_grid_of_the_image_is_found_behind_pooling_and_flattening(first):
    torch.manual_seed(0)
    n = nn.Sequential(*first)(X).shape[1]
    m = convert(nn.Sequential(*first, nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 5)), bit_policy('4'), X).eval()
    q = m[len(first)].input_quant
    assert isinstance(q, InputQuant) and (q.lo, q.hi) == (X.min().item(), X.max().item())
    seen = []
    m[len(first)].register_forward_pre_hook(lambda m, args: seen.append(m._input(args[0])))
    with torch.no_grad(): m(X)
    assert seen[0].unique().numel() <= 256 and (seen[0] - m[:len(first)](X)).abs().max() <= q.scale/2*1.001


class Lowered(nn.Module):
    "Something between a ReLU and the next layer."
    def __init__(self, f):
        super().__init__()
        self.a, self.relu, self.b, self.f = nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 5), f

    def forward(self, x): return self.b(self.f(self.relu(self.a(x.flatten(1)))))


def put(x):
    x[:, 0] = -1.
    return x


@pytest.mark.parametrize('f,ok', [(lambda x: x + -1., False), (lambda x: -1 + x, False), (lambda x: torch.add(x, x, alpha=-1), False), (lambda x: x.add_(-.5), False), (lambda x: x - 1, False), (put, False),
                                  (lambda x: nn.functional.pad(x[:, 1:], (1, 0), value=-3.), False), (lambda x: nn.functional.pad(x[:, 1:], (1, 0), 'constant', .3), False),
                                  (lambda x: x + 1., True), (lambda x: x + x, True), (lambda x: nn.functional.pad(x[:, 1:], (1, 0)), True)])
def test_what_puts_a_value_below_zero_is_seen(f, ok):
    if ok:
        assert len(quant_layers(convert(Lowered(f), bit_policy('4'), X))) == 2
        return
    with pytest.raises(ConversionError, match='b .Linear. reads a signed value'): convert(Lowered(f), bit_policy('4'), X)


def test_a_description_with_the_old_names_of_relus_fits():
    "They were numbered in the order in which they run."
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    m = convert(resnet18(5), bit_policy('4/2'), x).eval()
    for i, o in enumerate(pacts(m).values()): o.alpha.data.fill_(1 + i/16)
    order = []
    hooks = [o.register_forward_pre_hook(lambda _, args, n=n: order.append(n)) for n, o in pacts(m).items() if not n.endswith('input_quant')]
    with torch.no_grad(): want = m(x)
    for h in hooks: h.remove()
    old = {n: f'relu_{i}' for i, n in enumerate(order)}
    c = quant_config(m)
    c['pacts'] = {old.get(n, n): v for n, v in c['pacts'].items()}
    state = {old.get(k.rpartition('.')[0], k.rpartition('.')[0]) + '.' + k.rpartition('.')[2]: v for k, v in m.state_dict().items()}
    assert 'relu_16.alpha' in state and set(c['pacts']) >= {f'relu_{i}' for i in range(17)}
    again = apply_quant_config(resnet18(5), c).eval()
    again.load_state_dict(state)
    with torch.no_grad(): assert torch.equal(pickle.loads(pickle.dumps(again))(x), want)
    again.load_state_dict(m.state_dict())
