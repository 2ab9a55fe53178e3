import math, pathlib, sys
from fractions import Fraction
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from qisal.core import ATTRIBUTIONS, BadInput
from qisal.saliency import (apply_mask, attribute, bottom_mask, completeness_gap, eval_mode, feature_saliency, fill_values, last_conv, n_masked,
                            saliency_gradient, standard_normal, top_mask, true_class_score)
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reference_saliency as ref


class Net(nn.Module):
    def __init__(self, n_in=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(n_in, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.5), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(5*4, 3)
    def forward(self, x): return self.head(self.body(x))


class Rounded(torch.autograd.Function):
    "A straight-through rounding like the quantizers': a custom autograd Function in the graph."
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        return (x.clamp(0, alpha.item())*3/alpha).round()*alpha/3
    @staticmethod
    def backward(ctx, g):
        x, alpha = ctx.saved_tensors
        return g*((x >= 0) & (x < alpha)), (g*(x >= alpha)).sum()


class QuantConv(nn.Conv2d): pass


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.alpha, self.head = QuantConv(2, 4, 3), nn.Parameter(torch.tensor(1.)), nn.Linear(4*36, 3)
    def forward(self, x): return self.head(Rounded.apply(self.conv(x), self.alpha).flatten(1))


def batch(n=5, c=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, 8, 8, generator=g), torch.randint(0, 3, (n,), generator=g)


@pytest.fixture(params=[Net, Quantized])
def model(request):
    torch.manual_seed(0)
    return request.param()


# gradient

@pytest.mark.parametrize('score', ['logit', 'log_prob'])
def test_gradient_matches_captum(model, score):
    from captum.attr import Saliency
    xb, yb = batch()
    f = model.eval() if score == 'logit' else lambda x: model.eval()(x).log_softmax(1)
    want = Saliency(f).attribute(xb.clone().requires_grad_(), target=yb, abs=False)
    torch.testing.assert_close(saliency_gradient(model, xb, yb, score), want, atol=1e-6, rtol=1e-5)
    assert want.abs().sum() > 0


def test_gradient_matches_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(3*4, 3)).double()
    xb, yb = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([2, 0])
    got, e = saliency_gradient(model, xb, yb), 1e-3
    for i in range(2):
        for p in range(16):
            d = torch.zeros_like(xb)
            d[i].view(-1)[p] = e
            with torch.no_grad(): want = (model(xb + d)[i, yb[i]] - model(xb - d)[i, yb[i]])/(2*e)
            assert abs(got[i].view(-1)[p] - want) < 1e-5


def test_gradient_leaves_parameters_graph_and_input_alone(model):
    xb, yb = batch()
    x = xb.clone().requires_grad_()
    pred = model.train()(x)
    saliency_gradient(pred, x, yb)
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    F.cross_entropy(pred, yb).backward()  # the graph is still there
    assert all(p.grad is not None for p in model.parameters())
    saliency_gradient(model, xb, yb)
    assert not xb.requires_grad
    with torch.no_grad(): assert saliency_gradient(model, xb, yb).abs().sum() > 0


def test_gradient_refuses_what_has_no_class():
    xb, yb = batch()
    flat = nn.Flatten()
    with pytest.raises(BadInput, match='requires_grad'): saliency_gradient(flat(xb), xb, yb)
    with pytest.raises(BadInput, match='float32'): saliency_gradient(flat, xb, yb.float())
    with pytest.raises(BadInput, match='tuple'): saliency_gradient(lambda x: (x, x), xb, yb)
    with pytest.raises(BadInput, match="Did you mean 'logit'"): saliency_gradient(flat, xb, yb, score='logits')
    with pytest.raises(BadInput, match='images'): saliency_gradient(flat, xb[0], yb)


# masks

@pytest.mark.parametrize('frac', [.1, .29, .3, .5, .57, .7, .9, .999])
@pytest.mark.parametrize('hw', [(1, 10), (10, 10), (28, 28), (7, 13)])
def test_share_is_the_exact_floor(frac, hw):
    h, w = hw
    k = math.floor(Fraction(str(frac))*h*w)
    assert n_masked(frac, h*w) == k
    s = torch.randn(3, h, w)
    for mask in (bottom_mask, top_mask): assert mask(s, frac).sum((1, 2)).tolist() == [k]*3
    assert bottom_mask(torch.zeros(3, h, w), frac).sum((1, 2)).tolist() == [k]*3


@pytest.mark.parametrize('values', ['few', 'zeros', 'signed_zeros', 'normal', 'inf', 'bf16', 'strided', 'one'])
def test_mask_is_numpys_stable_sort(values):
    g = torch.Generator().manual_seed(3)
    s = torch.randn(4, 9, 7, generator=g)
    if values == 'few': s = s.round()
    if values == 'zeros': s = s*0
    if values == 'signed_zeros': s = torch.where(s > 0, 0., -0.)
    if values == 'inf': s[0, :4], s[1, 2] = math.inf, -math.inf
    if values == 'bf16': s = s.bfloat16()
    if values == 'strided': s = torch.randn(7, 9, 4, generator=g).round().permute(2, 1, 0)
    if values == 'one': s = s[:1]
    for frac in (.05, .33, .5, .98, 1):
        for mask, sign in ((bottom_mask, 1), (top_mask, -1)):
            flat = sign*s.float().numpy().reshape(len(s), -1)
            want = np.zeros(flat.shape, bool)
            np.put_along_axis(want, np.argsort(flat, 1, kind='stable')[:, :n_masked(frac, 63)], True, 1)
            assert (mask(s, frac).numpy().reshape(len(s), -1) == want).all()
        for i in range(len(s)): assert np.flatnonzero(bottom_mask(s, frac)[i].numpy()).tolist() == sorted(ref.bottom_positions(s[i].float(), frac))


def test_mask_keeps_its_share_with_nan():
    s = torch.randn(3, 4, 5)
    s[0], s[1, 0] = math.nan, math.nan
    assert bottom_mask(s, .5).sum((1, 2)).tolist() == [10]*3
    assert not bottom_mask(s, .5)[1, 0].any()  # NaN is larger than any number


def test_mask_bad_input():
    for frac in (-.1, 1.1, math.nan, 'half', True):
        with pytest.raises(BadInput, match='frac'): bottom_mask(torch.zeros(1, 2, 2), frac)
    with pytest.raises(BadInput, match='height'): bottom_mask(torch.zeros(1, 1, 2, 2), .5)
    xb = torch.zeros(2, 1, 3, 3)
    for mask in (torch.zeros(2, 1, 3, 3).bool(), torch.zeros(2, 3, 3), torch.zeros(1, 3, 3).bool()):
        with pytest.raises(BadInput, match='mask'): apply_mask(xb, mask)


def test_feature_saliency_is_mean_then_magnitude():
    g = torch.randn(3, 3, 4, 5)
    np.testing.assert_allclose(feature_saliency(g).numpy(), g.numpy().mean(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(feature_saliency(g, signed=False).numpy(), np.abs(g.numpy().mean(1)), rtol=1e-5, atol=1e-7)
    assert feature_saliency(g.bfloat16()).dtype == torch.float32


# fills

@pytest.mark.parametrize('fill', ['random', 'mean', 'corner', -1.5, 0])
@pytest.mark.parametrize('kind', ['plain', 'strided', 'bf16', 'one', 'leaf'])
def test_fill_by_hand(fill, kind):
    g = torch.Generator().manual_seed(1)
    xb = torch.randn(4, 3, 6, 5, generator=g)
    if kind == 'strided': xb = torch.randn(5, 6, 3, 8, generator=g).permute(3, 2, 1, 0)[::2]
    if kind == 'bf16': xb = xb.bfloat16()
    if kind == 'one': xb = xb[:1]
    if kind == 'leaf': xb = xb.requires_grad_()
    before, mask = xb.detach().clone(), bottom_mask(xb.detach().float().mean(1), .4)
    out = apply_mask(xb, mask, fill)
    assert torch.equal(xb.detach(), before) and out.dtype == xb.dtype and not out.requires_grad and out.data_ptr() != xb.data_ptr()
    for i in range(len(xb)):
        img, res, m = before[i], out[i], mask[i]
        assert torch.equal(res[:, ~m], img[:, ~m])
        if fill == 'mean': torch.testing.assert_close(res[:, m], img.mean((1, 2))[:, None].expand_as(res[:, m]))
        elif fill == 'corner': assert torch.equal(res[:, m], img[:, 0, 0][:, None].expand_as(res[:, m]))
        elif fill == 'random': assert (res[:, m] >= img.min()).all() and (res[:, m] <= img.max()).all() and res[:, m].unique().numel() > 5
        else: assert (res[:, m] == fill).all()


def test_random_fill_is_uniform_over_each_images_own_range_and_seeded():
    xb = torch.stack([torch.linspace(0, 1, 64*64).view(1, 64, 64), torch.linspace(5, 9, 64*64).view(1, 64, 64)])
    v = fill_values(xb, 'random', torch.Generator().manual_seed(0))
    for i, (lo, hi) in enumerate(((0, 1), (5, 9))):
        counts = torch.histc(v[i], 8, lo, hi)
        assert counts.sum() == 64*64 and (counts > 420).all()  # 512 expected a bin, standard deviation 21
    assert torch.equal(v, fill_values(xb, 'random', torch.Generator().manual_seed(0)))
    state = torch.get_rng_state()
    fill_values(xb, 'random', torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_fill_bad_input():
    for fill in ('median', None, math.nan, math.inf, True, [0]):
        with pytest.raises(BadInput, match='fill'): fill_values(torch.zeros(1, 1, 2, 2), fill)
    with pytest.raises(BadInput, match='floating'): fill_values(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 'mean')


# attributions

@pytest.mark.parametrize('method', ATTRIBUTIONS)
@pytest.mark.parametrize('score', ['logit', 'log_prob'])
def test_every_method_restores_everything(model, method, score):
    xb, yb = batch()
    model.train()
    model.head.eval()
    modes, bufs, x0 = [m.training for m in model.modules()], ref.buffers(model), xb.clone()
    a = attribute(model, xb, yb, method, score=score, n_samples=4, n_steps=4, generator=torch.Generator().manual_seed(0))
    assert a.shape == xb.shape and a.dtype == xb.dtype and not a.requires_grad and a.isfinite().all()
    assert [m.training for m in model.modules()] == modes and torch.equal(xb, x0) and not xb.requires_grad
    assert all(torch.equal(v, bufs[k]) for k, v in ref.buffers(model).items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize('method', [o for o in ATTRIBUTIONS if o not in ('smoothgrad', 'random')])
def test_pieces_are_the_whole(method):
    torch.manual_seed(0)
    model, (xb, yb) = Net(), batch(7)
    whole = attribute(model, xb, yb, method)
    torch.testing.assert_close(attribute(model, xb, yb, method, batch_size=3), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attribute(model, xb[2:3], yb[2:3], method), whole[2:3], atol=1e-5, rtol=1e-4)
    assert attribute(model, xb.bfloat16(), yb, 'random').dtype == torch.bfloat16


def test_methods_against_their_definitions():
    torch.manual_seed(0)
    model, (xb, yb) = Net().eval(), batch()
    grad = lambda x: saliency_gradient(model, x, yb)
    torch.testing.assert_close(attribute(model, xb, yb, 'input_x_gradient'), xb*grad(xb), atol=1e-6, rtol=1e-5)
    u, w = np.polynomial.legendre.leggauss(50)
    for base, value in ((0., 0.), (.5, .5), ('corner', xb[:, :, :1, :1]), (xb.flip(0), xb.flip(0))):
        want = sum(wi/2*grad(value + (xb - value)*float((ui + 1)/2)) for ui, wi in zip(u, w))*(xb - value)
        torch.testing.assert_close(attribute(model, xb, yb, 'integrated_gradients', baseline=base), want, atol=1e-5, rtol=1e-4)
    with torch.no_grad(): gap = true_class_score(model(xb), yb) - true_class_score(model(xb*0), yb)
    total = attribute(model, xb, yb, 'integrated_gradients', n_steps=300).sum((1, 2, 3))
    torch.testing.assert_close(total, gap, atol=2e-2, rtol=2e-2)


def test_smoothgrad_is_the_mean_of_noisy_gradients_at_each_images_own_scale():
    square = lambda x: torch.stack([(x**3).sum((1, 2, 3)), x.sum((1, 2, 3))], 1)  # gradient 3x^2; its mean under noise s is 3x^2 + 3s^2
    xb = torch.stack([torch.linspace(-1, 1, 64).view(1, 8, 8), torch.linspace(0, 10, 64).view(1, 8, 8), torch.full((1, 8, 8), 2.)])
    got = attribute(square, xb, torch.tensor([0, 0, 0]), 'smoothgrad', n_samples=4000, noise=.1, generator=torch.Generator().manual_seed(0))
    sd = torch.tensor([.2, 1., .1]).view(3, 1, 1, 1)
    torch.testing.assert_close(got.mean((1, 2, 3)), (3*xb**2 + 3*sd**2).mean((1, 2, 3)), rtol=2e-2, atol=0)
    plain = attribute(square, xb, torch.tensor([0, 0, 0]), 'smoothgrad', n_samples=3, noise=0.)
    torch.testing.assert_close(plain, 3*xb**2)


def test_chance_is_seeded_and_leaves_the_global_state():
    torch.manual_seed(0)
    model, (xb, yb) = Net(), batch()
    for method in ('random', 'smoothgrad'):
        state = torch.get_rng_state()
        a, b, c = [attribute(model, xb, yb, method, n_samples=5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        d = attribute(model, xb, yb, method, n_samples=5)
        torch.manual_seed(5)
        assert torch.equal(attribute(model, xb, yb, method, n_samples=5), d)


@pytest.mark.parametrize('method', ['smoothgrad', 'integrated_gradients'])
def test_passes_are_bounded_and_not_wasted(method):
    sizes = []
    class Counting(Net):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)
    torch.manual_seed(0)
    model, (xb, yb) = Counting(), batch(10)
    attribute(model, xb, yb, method, batch_size=64)
    assert max(sizes) <= 64 and sum(sizes) == 500 and len(sizes) <= 9
    sizes.clear()
    attribute(model, xb, yb, method, batch_size=4)
    assert max(sizes) <= 4 and sum(sizes) == 500


def test_gradcam_is_upsampled_from_the_last_convolution():
    torch.manual_seed(0)
    net, (xb, yb) = Net().eval(), batch()
    assert last_conv(net) is net.body[5] and isinstance(last_conv(Quantized()), QuantConv)
    with torch.no_grad(): act = net.body[:6](xb)
    act.requires_grad_()
    score = true_class_score(net.head(net.body[6:](act)), yb).sum()
    w = torch.autograd.grad(score, act)[0].mean((2, 3), keepdim=True)
    want = F.interpolate((w*act).sum(1, keepdim=True).relu(), size=(8, 8), mode='bilinear', align_corners=False)
    torch.testing.assert_close(attribute(net, xb, yb, 'gradcam'), want.expand_as(xb).detach(), atol=1e-6, rtol=1e-5)
    early = attribute(net, xb, yb, 'gradcam', layer=net.body[0])
    assert not torch.allclose(early, want.expand_as(xb).detach())
    with pytest.raises(BadInput, match='no Conv2d'): attribute(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), xb, yb, 'gradcam')


def test_callable_method_runs_in_evaluation_mode_and_is_checked():
    model, (xb, yb) = Net().train(), batch()
    def method(m, x, y):
        assert not m.training and len(x) <= 2
        return x*2
    assert torch.equal(attribute(model, xb, yb, method, batch_size=2), xb*2) and model.training
    with pytest.raises(BadInput, match='one number a pixel'): attribute(model, xb, yb, lambda m, x, y: x.mean(1))


def test_attribute_bad_input_before_any_pass():
    calls = []
    model, (xb, yb) = lambda x: calls.append(1), batch()
    for bad in (dict(method='gradients'), dict(score='x'), dict(n_samples=0), dict(n_steps=0), dict(batch_size=0), dict(noise=-1)):
        with pytest.raises(BadInput): attribute(model, xb, yb, **bad)
    with pytest.raises(BadInput, match='Labels'): attribute(model, xb, yb[:2])
    with pytest.raises(BadInput, match='Labels'): attribute(model, xb, yb.float())
    with pytest.raises(BadInput, match='gradient, input_x_gradient, smoothgrad, integrated_gradients, gradcam, random'): attribute(model, xb, yb, 'nope')
    assert not calls


def test_eval_mode_restores_on_error():
    net = Net().train()
    net.body[1].eval()
    modes = [m.training for m in net.modules()]
    with pytest.raises(KeyboardInterrupt):
        with eval_mode(net): raise KeyboardInterrupt
    assert [m.training for m in net.modules()] == modes


def test_captum_is_imported_only_when_needed():
    import subprocess
    code = "import sys, torch, qisal.saliency as s; s.attribute(torch.nn.Flatten(), torch.zeros(1, 1, 2, 2), torch.tensor([0])); assert 'captum' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('batch_size', [4, 12, 1000])
def test_smoothgrad_is_captums_where_all_images_have_the_same_range(batch_size, monkeypatch):
    "Given the same noise; Captum's one deviation for the batch is then every image's own."
    from captum.attr import NoiseTunnel, Saliency
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 3)).eval()
    xb, yb = torch.rand(4, 2, 8, 8), torch.tensor([0, 1, 2, 1])
    xb[:, 0, 0, 0], xb[:, 0, 0, 1] = 0., 1.
    got = attribute(model, xb, yb, 'smoothgrad', n_samples=7, noise=.2, batch_size=batch_size, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch, 'normal', lambda mean, std: mean + std*standard_normal(std.shape, g))
    want = NoiseTunnel(Saliency(model)).attribute(xb, nt_type='smoothgrad', nt_samples=7, stdevs=.2, abs=False, target=yb)
    torch.testing.assert_close(got, want.detach(), atol=1e-6, rtol=1e-4)


def test_normal_numbers_are_one_stream():
    "In parts of any size they are what they are at once, and normal."
    whole = standard_normal((40, 3, 5), torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    assert torch.equal(torch.cat([standard_normal((n, 3, 5), g) for n in (1, 7, 32)]), whole)
    many = standard_normal(100_000, torch.Generator().manual_seed(0))
    assert abs(many.mean()) < .01 and abs(many.std() - 1) < .01 and 3.5 < many.abs().max() < 6


@pytest.mark.parametrize('n_samples, batch_size', [(7, 3), (7, 7), (7, 20), (7, 1000), (300, 256)])
def test_smoothgrads_noise_is_an_images_own(n_samples, batch_size):
    "Alone, in parts or together, in passes of any size: the same map."
    torch.manual_seed(0)
    model, (xb, yb) = Net(), batch(6)
    sg = lambda x, y, g, bs=batch_size: attribute(model, x, y, 'smoothgrad', n_samples=n_samples, batch_size=bs, generator=g)
    want = sg(xb, yb, torch.Generator().manual_seed(3), 64)
    torch.testing.assert_close(sg(xb, yb, torch.Generator().manual_seed(3)), want, atol=1e-6, rtol=1e-4)
    g = torch.Generator().manual_seed(3)
    parts = [sg(xb[a:b], yb[a:b], g) for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts), want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('batch_size', [2, 3, 100])
def test_a_baseline_per_image_goes_with_its_image(batch_size):
    torch.manual_seed(0)
    model, (xb, yb) = Net(), batch(7)
    base = torch.randn(xb.shape, generator=torch.Generator().manual_seed(9))
    ig = lambda x, y, b, **kw: attribute(model, x, y, 'integrated_gradients', baseline=b, n_steps=10, **kw)
    got = ig(xb, yb, base, batch_size=batch_size)
    for i in range(7): torch.testing.assert_close(got[i:i+1], ig(xb[i:i+1], yb[i:i+1], base[i]), atol=1e-5, rtol=1e-4)
    one = ig(xb, yb, base[:1], batch_size=batch_size)
    torch.testing.assert_close(one, ig(xb, yb, base[0]), atol=1e-5, rtol=1e-4)
    for bad in (base[:3], base[..., :4], torch.zeros(5)):
        with pytest.raises(BadInput, match='baseline'): ig(xb, yb, bad)


def test_a_random_baseline_does_not_depend_on_the_passes():
    torch.manual_seed(0)
    model, (xb, yb) = Net(), batch(7)
    ig = lambda bs: attribute(model, xb, yb, 'integrated_gradients', baseline='random', n_steps=5, batch_size=bs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ig(2), ig(100), atol=1e-5, rtol=1e-4)


def test_completeness_gap_is_small_in_float_and_told_for_rounded_networks():
    for net, small in ((Net(), True), (Quantized(), False)):
        torch.manual_seed(1)
        for p in net.parameters(): nn.init.normal_(p, std=.4) if p.ndim > 1 else None
        xb, yb = batch(6)
        a = attribute(net, xb, yb, 'integrated_gradients', n_steps=200, baseline='corner')
        gap, rise = completeness_gap(net, xb, yb, a, baseline='corner').T
        with torch.no_grad(), eval_mode(net): want = true_class_score(net(xb), yb) - true_class_score(net(xb[:, :, :1, :1].expand_as(xb)), yb)
        torch.testing.assert_close(rise, want)
        torch.testing.assert_close(gap, a.sum((1, 2, 3)) - want)
        assert (gap.abs().max() < .02*rise.abs().max()) == small, (gap, rise)
        per_image = torch.zeros_like(xb)
        assert torch.equal(completeness_gap(net, xb, yb, a, baseline=per_image), completeness_gap(net, xb, yb, a))
    with pytest.raises(BadInput, match='drawn anew'): completeness_gap(net, xb, yb, a, baseline='random')
    with pytest.raises(BadInput, match='one number a pixel'): completeness_gap(net, xb, yb, a[:2])


class Gated(nn.Module):
    "A convolution, then a gate of its own channels whose 1 x 1 convolutions are defined (and may run) last."
    def __init__(self, late=False, dead=False, twice=False):
        super().__init__()
        self.late, self.twice = late, twice
        self.far = nn.Conv2d(4, 4, 3, padding=1)
        self.near, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        if dead: nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = self.near(x).relu()
        y = self.norm(self.far(x))
        if self.twice: y = self.norm(self.far(y))
        return self.head((x + y*self.gate(y)).mean((2, 3)))


def test_gradcam_takes_the_last_convolution_that_ran_on_a_map():
    torch.manual_seed(0)
    net, (xb, yb) = Gated(), batch()
    assert last_conv(net) is net.gate[1] and last_conv(net.eval(), xb) is net.far  # not the gate's, not the last by definition
    assert torch.equal(attribute(net, xb, yb, 'gradcam'), attribute(net, xb, yb, 'gradcam', layer=net.far))
    with pytest.raises(BadInput, match='gate.1.*more than one position'): attribute(net, xb, yb, 'gradcam', layer=net.gate[1])
    with pytest.raises(BadInput, match='far runs 2 times'): attribute(Gated(twice=True), xb, yb, 'gradcam')
    with pytest.raises(BadInput, match='does not depend on layer far'): attribute(Gated(dead=True), xb, yb, 'gradcam')
    with pytest.raises(BadInput, match='runs 0 times'): attribute(net, xb, yb, 'gradcam', layer=nn.Conv2d(4, 4, 1))
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(BadInput, match='more than one position for'): attribute(tiny, xb, yb, 'gradcam')
    assert not any(m._forward_hooks for o in (net, tiny) for m in o.modules())


def test_gradcams_layer_does_not_depend_on_the_batch():
    "An image for which every unit is dead gets its blank map, not an error or another layer."
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2*36, 3))
    with torch.no_grad(): net[0].bias.fill_(0.)
    xb = torch.stack([torch.zeros(1, 8, 8), torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))])
    y = torch.tensor([1, 1])
    with torch.no_grad(): net[0].bias.fill_(-.01)
    both = attribute(net, xb, y, 'gradcam')
    assert torch.equal(attribute(net, xb[:1], y[:1], 'gradcam'), both[:1]) and not both[0].any()


def test_images_need_not_be_square():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    xb, yb = torch.randn(3, 2, 7, 12), torch.tensor([0, 1, 2])
    for method in ATTRIBUTIONS: assert attribute(net, xb, yb, method, n_samples=3, n_steps=3).shape == xb.shape
    assert bottom_mask(xb.mean(1), .5).sum((1, 2)).tolist() == [42]*3
