"""Quantizers and conversion against independent oracles, at their edges, and on torchvision's networks."""
import copy, os, subprocess, sys, tempfile

import numpy as np, pytest, torch
import torchvision.models as tv
from torch import nn

from qisal.core import WEIGHT_QUANTIZERS, BadInput
from qisal.models import get_model, separate_relus, small_cnn
from qisal.quant import (ALPHA_MIN, PACT, ConversionError, InputQuant, apply_quant_config, bake, best_alpha, bit_policy, calibrate, compile_pact, convert, has_compiler, pact, pacts, quant_config,
                         quant_layers, quantize_weight, n_levels, sawb_clip, strip, weight_codes)

devices = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]


def oracle(x, alpha, bits):
    "PACT from its definition, in float32 as the quantizer works: value, d/dx, d/dalpha."
    s = np.float32(alpha)/np.float32(2**bits - 1)
    return np.clip(np.round(x/s), 0, 2**bits - 1)*s, (x >= 0) & (x < alpha), x >= alpha


@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
def test_pact_matches_the_definition(bits, dtype, device):
    torch.manual_seed(bits)
    for alpha in (.3, 1., 6., 10.):
        base = torch.randn(6, 4, 5, 5, device=device)*alpha
        base.view(-1)[:6] = torch.tensor([0., -0., alpha, -1e-30, 1e4, -1e4], device=device)
        for x in (base, base.transpose(1, 3), base.to(memory_format=torch.channels_last), base[:, ::2, 1:], base[:1, :1, :1, :1]):
            x = x.to(dtype).detach().requires_grad_()
            a = torch.tensor(alpha, device=device, requires_grad=True)
            g = torch.randn(x.shape, device=device).to(dtype)
            y = pact(x, a, bits)
            y.backward(g)
            want, dx, da = oracle(x.detach().float().cpu().numpy(), np.float32(alpha), bits)
            assert y.dtype == dtype and y.shape == x.shape
            assert torch.equal(y.detach().cpu(), torch.tensor(want).to(dtype))
            assert torch.equal(x.grad.cpu(), (g.cpu()*torch.tensor(dx)))
            np.testing.assert_allclose(a.grad.item(), (g.float().cpu().numpy()*da).sum(dtype=np.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_pact_gradient_is_the_slope_of_the_clip(bits):
    "Away from the kinks the straight-through gradients are the finite differences of clip(x, 0, alpha)."
    torch.manual_seed(0)
    x, alpha, h = torch.randn(500, dtype=torch.float64)*3, 2., 1e-4
    x = x[(x.abs() > .01) & ((x - alpha).abs() > .01)]
    clip = lambda x, a: x.clamp(0, a)  # noqa: E731
    xg, ag = x.float().requires_grad_(), torch.tensor(alpha, requires_grad=True)
    gx, ga = torch.autograd.grad(pact(xg, ag, bits).sum(), (xg, ag))
    np.testing.assert_allclose(gx, (clip(x + h, alpha) - clip(x - h, alpha))/(2*h), atol=1e-6)
    np.testing.assert_allclose(ga, ((clip(x, alpha + h) - clip(x, alpha - h))/(2*h)).sum(), rtol=1e-5)


def test_pact_with_alpha_at_the_maximum_of_the_data():
    x = torch.tensor([0., 1., 2., 3.], requires_grad=True)
    alpha = torch.tensor(3., requires_grad=True)
    y = pact(x, alpha, 2)
    y.sum().backward()
    assert y.tolist() == [0, 1, 2, 3] and x.grad.tolist() == [1, 1, 1, 0] and alpha.grad.item() == 1


def test_pact_keeps_one_byte_an_element():
    "What waits for backward says in which part of the clip an input was, and nothing else."
    x = torch.tensor([-1., 0., .5, 1., 2.], requires_grad=True)
    saved, = pact(x, torch.tensor(1., requires_grad=True), 4).grad_fn.saved_tensors
    assert saved.dtype == torch.uint8 and saved.tolist() == [0, 1, 1, 2, 2]


def test_an_infinite_gradient_outside_the_clip_stays_outside():
    x, alpha = torch.tensor([-1., .5, 3.], requires_grad=True), torch.tensor(1., requires_grad=True)
    pact(x, alpha, 4).backward(torch.tensor([float('inf'), 2., 3.]))
    assert x.grad.tolist() == [0, 2, 0] and alpha.grad.item() == 3


def test_nothing_is_kept_where_nothing_learns():
    with torch.no_grad(): y = pact(torch.randn(8, requires_grad=True), torch.tensor(1., requires_grad=True), 4)
    assert y.grad_fn is None and torch.equal(y, y.clamp(0, 1))


@pytest.fixture(scope='module')
def compiler():
    if not has_compiler(): pytest.skip('no C++ compiler')


@pytest.fixture
def compiled(compiler):
    assert compile_pact() is True
    yield
    assert compile_pact(False) is False


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_compiled_pact_matches_the_definition(bits, compiled):
    "All shapes, layouts and types, whether the compiled functions take them or leave them."
    torch.manual_seed(bits)
    base = torch.randn(6, 8, 20, 20)*2
    base.view(-1)[:6] = torch.tensor([0., -0., 2.5, -1e-30, 1e4, -1e4])
    for x in (base, base.view(-1)[:4096], base.transpose(1, 3), base.to(memory_format=torch.channels_last), base[:, ::2], base.bfloat16(), base.view(60, -1)):
        x, a = x.detach().requires_grad_(), torch.tensor(2.5, requires_grad=True)
        g = torch.randn(x.shape).to(x.dtype)
        y = pact(x, a, bits)
        y.backward(g)
        want, dx, da = oracle(x.detach().float().numpy(), np.float32(2.5), bits)
        assert y.shape == x.shape and torch.equal(y.detach(), torch.tensor(want).to(x.dtype))
        assert torch.equal(x.grad, g*torch.tensor(dx))
        np.testing.assert_allclose(a.grad.item(), (g.float().numpy()*da).sum(dtype=np.float64), rtol=1e-3, atol=1e-3)


def test_a_gradient_of_another_layout_than_the_input(compiled):
    x, a = torch.randn(4, 8, 16, 16, requires_grad=True), torch.tensor(1., requires_grad=True)
    pact(x, a, 4).mean().backward()  # an expanded gradient: one number for all elements
    inside = (x >= 0) & (x < 1)
    assert torch.allclose(x.grad, inside/x.numel()) and torch.isclose(a.grad, (x >= 1).float().mean())


def test_one_compilation_serves_all_shapes_and_bits(compiled):
    from torch._dynamo.utils import counters
    def use(*shape, bits):
        x = torch.randn(shape, requires_grad=True)
        pact(x, torch.tensor(1., requires_grad=True), bits).sum().backward()
    use(4, 8, 16, 16, bits=4)
    before = counters['stats']['unique_graphs']
    for shape, bits in (((4, 8, 17, 17), 2), ((128, 128), 8), ((2, 64, 9, 9), 3)): use(*shape, bits=bits)
    assert counters['stats']['unique_graphs'] == before


@pytest.mark.parametrize('cxx,why', [('/nonexistent/g++', 'no C++ compiler found'), ('false', '')])
def test_a_missing_or_broken_compiler_is_said_and_training_goes_on(cxx, why):
    "In a process of its own, since what is compiled stays compiled. The second compiler is there but fails at everything."
    code = ("import warnings, torch\nfrom qisal.quant import compile_pact, pact\n"
            "with warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always'); print(compile_pact())\n"
            "print([str(o.message) for o in w if 'PACT' in str(o.message)])\n"
            "x = torch.randn(8192, requires_grad=True); pact(x, torch.tensor(1., requires_grad=True), 4).sum().backward(); print(int(x.grad.sum()) > 0)")
    with tempfile.TemporaryDirectory() as d:
        r = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, CXX=cxx, TORCHINDUCTOR_CACHE_DIR=d), capture_output=True, text=True, encoding='utf-8')
    on, said, went_on = r.stdout.strip().splitlines()
    assert on == 'False' and went_on == 'True' and "can't compile PACT" in said and why in said and said.count('uncompiled') == 1


@pytest.mark.parametrize('method', WEIGHT_QUANTIZERS)
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
@pytest.mark.parametrize('per_channel', [False, True])
def test_codes_times_scale_are_the_weights(bits, method, per_channel):
    torch.manual_seed(0)
    for w in (torch.randn(8, 3, 3, 3)*.1, torch.randn(5, 40), torch.rand(4, 4) - .2, torch.zeros(3, 3), torch.full((2, 2), .5), torch.randn(1, 1)):
        codes, scale = weight_codes(w, bits, method, per_channel)
        q = quantize_weight(w, bits, method, per_channel)
        assert torch.isfinite(q).all() and torch.equal(codes*scale, q) and codes.dtype == torch.int8
        assert len(codes.unique()) <= 2**bits
        odd = method == 'sawb_zero' or bits == 8
        assert codes.abs().max() <= (2**(bits - 1) - 1 if odd else 2**bits - 1)
        if not odd: assert (codes % 2 != 0).all()


def test_nearest_level():
    "Each weight goes to the level nearest to it."
    torch.manual_seed(0)
    w = torch.randn(200)
    for method in ('sawb', 'sawb_zero'):
        for bits in (2, 3, 4):
            q = quantize_weight(w, bits, method)
            levels = q.unique()
            best = (w[:, None] - levels).abs().min(1).values
            assert torch.allclose((w - q).abs(), best, atol=1e-6)


def test_quantized_and_float_gradients_reach_the_same_parameters():
    torch.manual_seed(0)
    net = convert(small_cnn(), bit_policy('4'), torch.randn(4, 1, 28, 28))
    net(torch.randn(8, 1, 28, 28)).square().sum().backward()
    for n, p in net.named_parameters(): assert p.grad is not None and torch.isfinite(p.grad).all(), n


@pytest.mark.parametrize('bits', ['8', '4', '3', '2', '4/2', 'w2a4', 'w4a2'])
@pytest.mark.parametrize('arch', ['small_cnn', 'lenet5', 'resnet20', 'resnet18'])
def test_every_layer_is_on_its_grid(arch, bits):
    "The number of distinct weights and inputs of every layer is what its bits allow: no silent float layer."
    torch.manual_seed(0)
    x = torch.randn(4, 1, 28, 28)
    net = convert(get_model(arch), bit_policy(bits), x).eval()
    seen, hooks = {}, []
    for name, m in quant_layers(net).items():
        hooks.append(m.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, m._input(args[0]).unique().numel())))
    with torch.no_grad(): net(x)
    layers = quant_layers(net)
    want = bit_policy(bits).layers(len(layers))
    assert len(seen) == len(layers)
    for (name, m), (w, a) in zip(layers.items(), want):
        assert m.quant_weight().unique().numel() <= 2**m.w_bits and seen[name] <= 2**m.a_bits, name
        if arch in ('small_cnn', 'lenet5'): assert (m.w_bits, m.a_bits) == (w, a)
    assert not [n for n, m in net.named_modules() if type(m) in (nn.Conv2d, nn.Linear, nn.ReLU)]


@pytest.mark.parametrize('name', ['alexnet', 'squeezenet1_1', 'densenet121', 'resnet34', 'resnext50_32x4d'])
def test_torchvision_networks(name):
    torch.manual_seed(0)
    raw = getattr(tv, name)(weights=None, num_classes=4)
    with pytest.raises(ConversionError, match='separate_relus'): convert(raw, bit_policy('4'), torch.randn(2, 3, 64, 64))
    keys = set(raw.state_dict())
    net = separate_relus(copy.deepcopy(raw))  # the result shares its layers with its argument
    assert set(net.state_dict()) == keys
    x = torch.randn(2, 3, 64, 64)
    net.eval()
    raw.eval()
    with torch.no_grad(): assert torch.allclose(net(x), raw(x.clone()), atol=1e-5)
    convert(net, bit_policy('4'), x)
    with torch.no_grad(): assert torch.isfinite(net(x)).all()
    assert not [n for n, m in net.named_modules() if type(m) in (nn.Conv2d, nn.Linear, nn.ReLU)]
    again = apply_quant_config(separate_relus(copy.deepcopy(raw)), quant_config(net))
    again.load_state_dict(net.state_dict())
    with torch.no_grad(): assert torch.equal(again.eval()(x), net(x))


@pytest.mark.parametrize('name,names', [('mobilenet_v3_small', 'hardswish'), ('mobilenet_v2', 'hardtanh|relu6'), ('vit_b_16', 'multi_head|linear|gelu'),
                                        ('convnext_tiny', 'gelu|LayerNorm|signed')])
def test_torchvision_networks_that_cannot_be_quantized(name, names):
    net = getattr(tv, name)(weights=None).eval()
    size = 224 if name == 'vit_b_16' else 64
    with pytest.raises(ConversionError, match=names): convert(net, bit_policy('4'), torch.randn(2, 3, size, size))
    assert not quant_layers(net) and not pacts(net)


def test_a_layer_reading_a_shared_relu_takes_its_bits():
    "In ResNet-18 the first convolution of a block and its shortcut read one activation: their widths agree."
    net = convert(get_model('resnet18', n_in=3, size=32), bit_policy('4/2'), torch.randn(2, 3, 32, 32))
    q = quant_layers(net)
    for block in ('layer2.0', 'layer3.0', 'layer4.0'): assert q[f'{block}.conv1'].a_bits == q[f'{block}.downsample.0'].a_bits
    with pytest.raises(BadInput, match='override both'):
        convert(get_model('resnet18', n_in=3, size=32), bit_policy('4'), torch.randn(2, 3, 32, 32), overrides={'layer2.0.downsample.0': 8})


def test_failed_conversion_changes_nothing():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*26*26, 10), nn.Sigmoid(), nn.Linear(10, 10))
    before = repr(net)
    net.train()
    with pytest.raises(ConversionError, match='4 .Sigmoid.'): convert(net, bit_policy('4'), torch.randn(2, 1, 28, 28))
    assert repr(net) == before and net.training and not net[0]._forward_hooks and not net[0]._forward_pre_hooks


def test_strip_then_convert_again():
    torch.manual_seed(0)
    x = torch.randn(4, 1, 28, 28)
    net = convert(small_cnn(), bit_policy('4'), x).eval()
    with torch.no_grad():
        want = net(x)
        assert torch.equal(convert(strip(net), bit_policy('4'), x)(x), want)
        assert torch.equal(bake(net)(x), want)


def test_input_quant_is_the_affine_grid_of_integers():
    iq = InputQuant(-.5, 2., 4)
    x = torch.linspace(-1, 3, 101)
    q = iq.codes(x.clone())
    want = np.clip(np.round(x.numpy()/np.float32(iq.scale)) + iq.zero_point, 0, 15)
    np.testing.assert_array_equal(q, want)
    np.testing.assert_allclose(iq(x), (want - iq.zero_point)*iq.scale, rtol=1e-6)
    assert iq(torch.zeros(1)).item() == 0 and isinstance(iq.zero_point, int)


def test_touched_is_remembered_and_alpha_recovers():
    m = PACT(4, 1.).train()
    m.alpha.data.fill_(-5.)
    opt = torch.optim.SGD([m.alpha], .1)
    for _ in range(50):
        opt.zero_grad()
        (m(torch.full((4,), 2.)) - 2).square().mean().backward()
        opt.step()
    assert m.touched and m.alpha.item() > 1


@pytest.mark.parametrize('arch,shape', [('lenet5', (16, 1, 28, 28)), ('resnet20', (8, 3, 32, 32))])
def test_calibration_sees_what_the_quantized_layers_before_give(arch, shape):
    "The same as setting one alpha after the other, each on the inputs of a pass of its own."
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = convert(get_model(arch, n_in=shape[1], size=shape[2]), bit_policy('4/2'), x)
    twin = copy.deepcopy(model)
    calibrate(model, x)
    assert model.training and all(m.training for m in model.modules())
    twin.eval()
    order, seen = [], {}
    def note(m, args):
        order.append(m)
        seen[m] = args[0]
    hooks = [m.register_forward_pre_hook(note) for m in pacts(twin).values()]
    with torch.no_grad():
        twin(x)
        run = list(order)
        for m in run:
            twin(x)
            m.alpha.fill_(best_alpha(seen[m], m.bits))
    for h in hooks: h.remove()
    assert [m.alpha.item() for m in pacts(model).values()] == [m.alpha.item() for m in pacts(twin).values()]
    assert len({m.alpha.item() for m in pacts(model).values()}) > 2


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_best_alpha_at_its_edges(bits):
    assert best_alpha(torch.zeros(5), bits) == best_alpha(-torch.ones(5), bits) == ALPHA_MIN
    assert best_alpha(torch.full((5,), 3.), bits) == pytest.approx(3., rel=.02)
    assert best_alpha(torch.rand(4096, dtype=torch.bfloat16), bits) <= 1
    grid = torch.arange(2**bits)*.5  # values that are on a grid already: nothing has to change
    assert best_alpha(grid, bits) == pytest.approx(grid.max().item(), rel=.02)


# --- every type, every number of threads ---

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('method', WEIGHT_QUANTIZERS)
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
@pytest.mark.parametrize('per_channel', [False, True])
def test_a_weight_is_quantized_alike_in_every_type(dtype, method, bits, per_channel):
    "The result in float64 of the weights as their type holds them, rounded to that type; from 1e-4 (below float16's normal numbers) to 1e3."
    torch.manual_seed(0)
    for size in (1e-4, .05, 1., 1e3):
        w = (torch.randn(8, 4, 3, 3)*size).to(dtype)
        got, want = quantize_weight(w, bits, method, per_channel), quantize_weight(w.double(), bits, method, per_channel)
        step = weight_codes(w.double(), bits, method, per_channel)[1]
        off = (got.double() - want).abs()
        unit = 2*torch.finfo(dtype).eps*want.abs() + torch.finfo(dtype).smallest_normal*torch.finfo(dtype).eps
        assert got.dtype == dtype and ((off <= unit).double().mean() > .98) and (off <= 2*step*1.01 + unit).all()  # a tie may fall to the other side
        codes, scale = weight_codes(w, bits, method, per_channel)
        assert torch.equal((codes*scale).to(dtype), got) and scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        clip = sawb_clip(w, bits, method == 'sawb_zero', per_channel) if method != 'dorefa' else None
        if clip is not None: assert torch.allclose(clip.double(), sawb_clip(w.double(), bits, method == 'sawb_zero', per_channel), rtol=1e-6)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('method', WEIGHT_QUANTIZERS)
def test_gradients_of_weights_in_every_type(dtype, method):
    "Straight through; a channel of zeros gets the gradient of the others, neither none nor a huge one."
    torch.manual_seed(0)
    w = (torch.randn(4, 20)*.01).to(dtype)
    w[1] = 0
    for per_channel in (False, True):
        v = w.clone().requires_grad_()
        q = quantize_weight(v, 4, method, per_channel)
        q.sum().backward()
        assert v.grad.dtype == dtype and torch.isfinite(v.grad).all() and (v.grad[1] - 1).abs().max() < .05
        assert q[1].abs().max() <= q.abs().max()/10 and torch.isfinite(q).all()  # zero, or the level next to it
        z = torch.zeros(3, 3, dtype=dtype, requires_grad=True)
        quantize_weight(z, 4, method, per_channel).sum().backward()
        assert torch.equal(z.grad, torch.ones_like(z)) and quantize_weight(z, 4, method, per_channel).float().abs().max() < 1e-20
    assert torch.isfinite(torch.autograd.grad(quantize_weight(z, 4, 'dorefa', rescale=False).sum(), z)[0]).all()


@pytest.mark.parametrize('per_channel', [False, True])
def test_a_channel_of_zeros_has_a_scale(per_channel):
    "One that float32 holds and that is above 0, with and without a level of zero."
    w = torch.randn(4, 20)
    w[1] = 0
    for method in WEIGHT_QUANTIZERS:
        for bits in (2, 4, 8):
            codes, scale = weight_codes(w, bits, method, per_channel)
            assert (scale > torch.finfo(torch.float32).tiny).all()
            if n_levels(bits, method) % 2: assert (codes[1] == 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_type_is_near(dtype):
    "The 16-bit types round what the layers pass on, so that some values fall on the next level."
    torch.manual_seed(0)
    x = torch.randn(64, 1, 28, 28)
    net = convert(small_cnn(), bit_policy('4'), x).eval()
    with torch.no_grad():
        want = net(x)
        got = copy.deepcopy(net).to(dtype)(x.to(dtype))
        assert got.dtype == dtype and (got.float() - want).abs().mean() < {torch.float16: .1, torch.bfloat16: .3, torch.float64: .01}[dtype]*want.abs().mean()
        baked = bake(copy.deepcopy(net).to(dtype))
        assert torch.equal(baked(x.to(dtype)), got)


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
def test_the_clip_does_not_depend_on_the_number_of_threads(bits):
    had = torch.get_num_threads()
    try:
        for seed in range(6):
            torch.manual_seed(seed)
            w = torch.randn(128, 1152)*.05
            res = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                res.append([sawb_clip(w, bits), sawb_clip(w, bits, True), sawb_clip(w, bits, per_channel=True), quantize_weight(w, bits), quantize_weight(w, bits, 'dorefa'), torch.tensor(best_alpha(w, bits))])
            for o in res[1:]: assert all(torch.equal(a, b) for a, b in zip(res[0], o))
    finally: torch.set_num_threads(had)


def test_moments_are_those_of_float64():
    torch.manual_seed(0)
    w = torch.randn(64, 1152)*.05 + .01
    v = w.double().numpy()
    for bits, (c1, c2) in {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64)}.items():
        want = c1*np.sqrt((v**2).mean()) + c2*np.abs(v).mean()
        assert sawb_clip(w, bits).item() == np.float32(want)
        rows = c1*np.sqrt((v**2).mean(1)) + c2*np.abs(v).mean(1)
        np.testing.assert_allclose(sawb_clip(w, bits, per_channel=True).flatten(), rows.astype(np.float32), rtol=1e-7)


@pytest.mark.parametrize('zero', [False, True])
@pytest.mark.parametrize('make', [lambda: torch.rand(16, 50) - .5, lambda: torch.randn(16, 50), lambda: torch.distributions.Laplace(0., 1.).sample((16, 50))])
def test_at_8_bits_nothing_is_cut_off(zero, make):
    torch.manual_seed(0)
    w = make()
    method = 'sawb_zero' if zero else 'sawb'
    assert sawb_clip(w, 8, zero) == w.abs().max() and torch.equal(sawb_clip(w, 8, zero, True).flatten(), w.abs().amax(1))
    assert (quantize_weight(w, 8, method) - w).abs().max() <= w.abs().max()/127/2*1.0001
    codes, scale = weight_codes(w, 8, method)
    assert codes.abs().max() == 127 and scale*127 == pytest.approx(w.abs().max().item())


# --- compiled is eager ---

LAYOUTS = dict(plain=lambda x: x, channels_last=lambda x: x.to(memory_format=torch.channels_last), one_channel=lambda x: x[:, :1].to(memory_format=torch.channels_last),
               transposed=lambda x: x.transpose(1, 3), sliced=lambda x: x[:, ::2], flat=lambda x: x.reshape(-1), half=lambda x: x.half(), double=lambda x: x.double())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_compiled_and_eager_agree_in_everything(layout, compiled):
    "Values (NaN, infinities and zeros among them), gradients, layout, and what may be done with the result in place."
    torch.manual_seed(0)
    x = torch.randn(4, 8, 36, 36)*2
    x.view(-1)[:8] = torch.tensor([0., -0., 2.5, -1e-30, 1e30, -1e30, float('inf'), float('-inf')])
    x = LAYOUTS[layout](x)
    res = []
    for on in (False, True):
        compile_pact(on)
        leaf, alpha = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), torch.tensor(2.5, requires_grad=True)
        inner = leaf*1.
        y = pact(inner, alpha, 4)
        assert not y._is_view() and y._base is None and y.is_contiguous() == inner.is_contiguous() and y.stride() == inner.stride()
        got = y.detach().clone()
        with torch.no_grad(): inner.zero_()  # PACT keeps no number of its input
        y.mul_(2).add_(1)  # nor of its result
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        y.backward(g)
        res.append((got, leaf.grad, alpha.grad))
    compile_pact(True)
    (y0, g0, a0), (y1, g1, a1) = res
    assert torch.equal(y0, y1) and torch.equal(g0, g1) and g0.is_contiguous() == g1.is_contiguous() and y0.dtype == y1.dtype
    assert torch.allclose(a0, a1, rtol=1e-5, atol=1e-5*g0.abs().sum())


def test_nan_stays_nan_either_way(compiled):
    x = torch.randn(8192)
    x[5] = float('nan')
    for on in (False, True):
        compile_pact(on)
        y = pact(x.clone().requires_grad_(), torch.tensor(1., requires_grad=True), 4)
        assert y[5].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize('layer', [nn.Dropout(.2, inplace=True), nn.Hardtanh(inplace=True), nn.Threshold(.1, 0., inplace=True)])
def test_a_layer_may_change_the_result_in_place(layer, compiled):
    grads = []
    for on in (False, True):
        compile_pact(on)
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(1, 8, 3), PACT(4, 1.), copy.deepcopy(layer), nn.Flatten(), nn.Linear(8*26*26, 5))
        m(torch.randn(4, 1, 28, 28)).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads): assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_converted_network_can_be_compiled_whole(compiler):
    torch.manual_seed(0)
    x = torch.randn(4, 1, 12, 12)
    m = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)), bit_policy('4'), x)
    grads = []
    for f in (m, torch.compile(m)):
        m.zero_grad()
        y = f(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in m.parameters())])
    for a, b in zip(*grads): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    wrapped = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    assert convert(wrapped, bit_policy('4'), x) is wrapped and len(quant_layers(wrapped)) == 1


def test_a_range_from_large_to_small_is_refused():
    "(3, 1) became the grid from 0 to 1."
    for lo, hi in ((3, 1), (1, 0), (-1, -3)):
        with pytest.raises(BadInput, match=f'span .{lo}, {hi}., from large to small'): InputQuant(lo, hi)
    assert (InputQuant(1, 3).lo, InputQuant(1, 3).hi) == (0, 3)

def test_a_clipping_layer_takes_bits_as_numbers():
    assert [PACT(o).bits for o in (4, 4., '4', np.int64(4))] == [4]*4
    with pytest.raises(BadInput, match='bits is 4.5'): PACT(4.5)
