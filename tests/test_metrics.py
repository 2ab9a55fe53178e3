"""The metrics against oracles written as plain loops, at their edges, and with input that makes no sense."""
import math, random

import numpy as np, pandas as pd, pytest, torch
from torch import nn

import qisal.metrics as M
from qisal.core import BadInput
from qisal.data import get_dls
from qisal.metrics import (accuracy, bootstrap_interval, gini, map_similarity, mean_interval, masking_auc, masking_curve, masking_curves,
                           paired_difference, pixel_rank, predict, random_gap, road_fill, sanity_check, select_curve, sharpness,
                           total_variation, wilson_interval)
from qisal.saliency import saliency_gradient


class Linear(nn.Module):
    "Two classes, logits (s, -s) with s = sum(w * x)."
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        s = (x*self.w).flatten(1).sum(1)
        return torch.stack([s, -s], 1)


def small_net(c=1, size=9, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(c, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(6*(size - 2)**2, 4))


def small_data(n=23, c=1, size=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, size, size, generator=g), torch.randint(0, 4, (n,), generator=g)


def loop_curve(model, x, y, maps, fracs, fill, order):
    "The masking curve by its definition, one image and one pixel at a time."
    was = [m.training for m in model.modules()]
    model.eval()
    out = []
    for f in fracs:
        right = 0
        for xi, yi, m in zip(x.numpy(), y.tolist(), maps):
            size = m.shape
            pos = [(r, c) for r in range(size[0]) for c in range(size[1])]
            pos.sort(key=lambda p: (-m[p] if order == 'morf' else m[p]))  # stable: ties keep their position
            new = xi.copy()
            for r, c in pos[:math.floor(f*size[0]*size[1] + 1e-9)]:
                for ch in range(len(xi)):
                    new[ch, r, c] = xi[ch, 0, 0] if fill == 'corner' else xi[ch].mean() if fill == 'mean' else fill
            with torch.no_grad(): right += int(model(torch.from_numpy(new)[None]).argmax(1).item() == yi)
        out.append(right/len(x))
    for m, t in zip(model.modules(), was): m.training = t
    return out


FRACS = (0, .1, .29, .5, .77, .99)


@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('fill', ['corner', 'mean', .7])
@pytest.mark.parametrize('order', ['morf', 'lerf'])
def test_curve_equals_loops(c, fill, order):
    net, (x, y) = small_net(c), small_data(c=c)
    net.eval()
    g = saliency_gradient(net, x, y)
    maps = np.stack([np.abs(o.numpy().mean(0, dtype=np.float32)) for o in g])
    got = masking_curve(net, (x, y), fracs=FRACS, fill=fill, order=order, batch_size=5)
    assert got.accuracy.tolist() == loop_curve(net, x, y, maps, FRACS, fill, order)
    assert got.frac.tolist() == list(FRACS) and list(got.columns) == ['frac', 'accuracy']


@pytest.mark.parametrize('order', ['morf', 'lerf'])
def test_ties_go_by_position(order):
    net, (x, y) = small_net(), small_data()
    coarse = torch.randint(0, 3, (len(x), 9, 9), generator=torch.Generator().manual_seed(1)).float()
    at = {float(i[0, 4, 4]): m for i, m in zip(x, coarse)}  # a callable sees batches; find each image's map by a pixel
    callable_ = lambda model, xb, yb: torch.stack([at[float(i[0, 4, 4])] for i in xb])
    got = masking_curve(net, (x, y), callable_, fracs=FRACS, order=order, batch_size=4)
    assert got.accuracy.tolist() == loop_curve(net, x, y, coarse.numpy(), FRACS, 'corner', order)


def test_all_equal_attribution_removes_from_the_top_left():
    net, (x, y) = small_net(), small_data()
    zeros = np.zeros((len(x), 9, 9))
    for order in ('morf', 'lerf'):
        got = masking_curve(net, (x, y), lambda m, xb, yb: torch.zeros_like(xb), fracs=(0, .5), order=order)
        assert got.accuracy.tolist() == loop_curve(net, x, y, zeros, (0, .5), 'corner', order)


def test_known_answer_and_order_of_attributions():
    "s = 55 with weights 1 to 10 on ten of 100 pixels; a removed pixel takes 2w from s."
    w = torch.zeros(1, 10, 10)
    w[0, 4:6, 3:8] = torch.arange(1., 11).view(2, 5)
    net, x, y = Linear(w), torch.where(w > 0, 1., -1.).expand(30, 1, 10, 10), torch.zeros(30, dtype=torch.long)
    at = lambda f, **kw: masking_curve(net, (x, y), fracs=f, **kw).accuracy.tolist()
    assert at((.03, .04)) == [1, 0] and at((.96, .97), order='lerf') == [1, 0]
    for fill in ('corner', 'road'):
        df = masking_curves(net, (x, y), ('gradient', 'random'), fills=(fill,), orders=('morf', 'lerf'))
        area = {(a, o): select_curve(df, a, fill, o).attrs['auc'] for a in ('gradient', 'random') for o in ('morf', 'lerf')}
        assert area['gradient', 'morf'] < area['random', 'morf'] and area['random', 'lerf'] < area['gradient', 'lerf'], fill
        for o in ('morf', 'lerf'): assert random_gap(*[select_curve(df, a, fill, o) for a in ('gradient', 'random')]) > 0


@pytest.mark.parametrize('fill', ['corner', 'random', 'road'])
@pytest.mark.parametrize('attribution', ['gradient', 'random', 'input_x_gradient'])
def test_batch_size_does_not_matter(fill, attribution):
    net, (x, y) = small_net(3), small_data(n=41, c=3)
    a, b = [masking_curve(net, (x, y), attribution, fill=fill, batch_size=bs) for bs in (7, 41)]
    pd.testing.assert_frame_equal(a, b)


def test_one_pass_equals_many_and_seeds_matter():
    net, (x, y) = small_net(), small_data(n=200)
    both = masking_curves(net, (x, y), ('gradient', 'random'), fills=('random', 'road', .3), orders=('morf', 'lerf'))
    assert len(both) == 2*3*2*10 and (both.n == 200).all()
    for a in ('gradient', 'random'):
        for f in ('random', 'road', .3):
            for o in ('morf', 'lerf'):
                pd.testing.assert_frame_equal(select_curve(both, a, f, o), masking_curve(net, (x, y), a, fill=f, order=o), check_like=True)
    one, two = [masking_curve(net, (x, y), 'random', seed=s).accuracy for s in (0, 1)]
    assert not one.equals(two)


@pytest.mark.parametrize('fill', ['corner', 'road', 'random'])
def test_one_image_and_constant_model(fill):
    net, (x, y) = small_net(), small_data(n=1)
    got = masking_curve(net, (x, y), fill=fill)
    assert set(got.accuracy) <= {0., 1.} and got.attrs['n'] == 1
    class Constant(nn.Module):
        def forward(self, x): return torch.tensor([1., 0., 0., 0.]).expand(len(x), 4) + 0*x.sum()
    x, y = small_data(n=20)
    got = masking_curve(Constant(), (x, y), fill=fill)
    assert (got.accuracy == (y == 0).double().mean().item()).all() and got.attrs['auc'] == pytest.approx(1)


def test_first_point_is_the_accuracy_for_every_way_of_giving_data():
    dls = get_dls('mnist', sample=True, device='cpu')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    x, y = dls.test.dataset[torch.arange(1000)]
    want = accuracy(net, (x, y))
    torch_dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=300, shuffle=True)
    for data in (dls.test, (x, y), torch_dl):
        got = masking_curve(net, data, fracs=(0, .5))
        assert got.accuracy[0] == want and got.attrs['n'] == 1000
    passes = dls.train.passes
    assert masking_curves(net, dls.train, fracs=(0,)).n[0] == 1800 != len(dls.train)*dls.train.bs  # all, though it drops its last batch in training
    assert dls.train.passes == passes  # and its next order is what it would have been


@pytest.mark.parametrize('attribution', ['gradient', 'random', 'smoothgrad', 'integrated_gradients'])
def test_leaves_no_trace(attribution):
    net, (x, y) = small_net(), small_data()
    net.train()
    net[1].eval()
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    x0 = x.clone()
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    masking_curve(net, (x, y), attribution, fill='road', fracs=(0, .3))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and torch.equal(x, x0) and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), rng[0]) and (np.random.get_state()[1] == rng[1]).all() and random.getstate() == rng[2]


def test_callables_get_seeded_chance_and_leave_none():
    net, (x, y) = small_net(), small_data(n=200)
    def noise(model, xb, yb): return torch.rand_like(xb)*float(np.random.rand())*random.random() + torch.from_numpy(np.random.rand(*xb.shape)).float()
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    a = masking_curve(net, (x, y), noise)
    np.random.rand(), random.random(), torch.rand(1)
    pd.testing.assert_frame_equal(a, masking_curve(net, (x, y), noise))
    torch.set_rng_state(rng[0]), random.setstate(rng[2])
    np.random.seed(5)
    want = np.random.get_state()
    masking_curve(net, (x, y), noise, fracs=(0, .5))
    got = np.random.get_state()
    assert (got[1] == want[1]).all() and got[2] == want[2] and torch.equal(torch.get_rng_state(), rng[0]) and random.getstate() == rng[2]


def test_road_does_not_depend_on_the_rest_of_the_batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 20, 20, generator=g)*10
    mask = pixel_rank(torch.rand(6, 20, 20, generator=g)) < torch.tensor([4, 40, 80, 160, 320, 399]).view(6, 1, 1)  # easy to hard
    together = road_fill(x, mask, noise=0)
    for i in range(6): assert torch.allclose(road_fill(x[i:i+1], mask[i:i+1], noise=0)[0], together[i], atol=1e-6, rtol=0)


def test_modes_come_back_after_an_error():
    net, (x, y) = small_net(), small_data()
    net.train()
    def broken(model, xb, yb): raise KeyError('mine')
    with pytest.raises(KeyError, match='mine'): masking_curve(net, (x, y), broken)
    assert net.training and net[3].training


def test_frozen_model_and_no_grad_context():
    net, (x, y) = small_net(), small_data()
    want = masking_curve(net, (x, y))
    net.requires_grad_(False)
    with torch.no_grad(): pd.testing.assert_frame_equal(masking_curve(net, (x, y)), want)


def test_evaluation_mode_is_used():
    net, (x, y) = small_net(), small_data()
    net.train()
    a = predict(net, (x, y))[0]
    net.eval()
    with torch.no_grad(): assert torch.allclose(a, net(x))


def test_attribution_arguments_reach_attribute():
    net, (x, y) = small_net(), small_data(n=60)
    few = masking_curve(net, (x, y), 'smoothgrad', n_samples=2, noise=2.)
    many = masking_curve(net, (x, y), 'smoothgrad', n_samples=2, noise=0.)
    pd.testing.assert_frame_equal(many, masking_curve(net, (x, y)), check_like=True)
    assert not few.accuracy.equals(many.accuracy)


def test_rank_is_a_permutation_and_masks_are_nested():
    s = torch.randint(0, 5, (6, 7, 8)).float()
    for order in ('morf', 'lerf'):
        r = pixel_rank(s, order)
        assert (r.flatten(1).sort(1).values == torch.arange(56)).all()
        for k in (0, 1, 17, 56): assert ((r < k).flatten(1).sum(1) == k).all()
        v = s.flatten(1).gather(1, r.flatten(1).argsort(1))
        assert ((v.diff(dim=1) <= 0) if order == 'morf' else (v.diff(dim=1) >= 0)).all()


X, Y = small_data()
@pytest.mark.parametrize('kw, says', [
    (dict(fracs=()), 'fracs'), (dict(fracs=(0, 1)), 'not including'), (dict(fracs=(-.1, .5)), 'from 0'), (dict(fracs=(.1, .1)), 'each once'),
    (dict(fracs=.5), 'fracs'), (dict(fracs=('a',)), 'fracs'), (dict(fracs=(0, math.nan)), 'frac'),
    (dict(attribution='gradeint'), "Did you mean 'gradient'"), (dict(attribution=3), 'unknown'), (dict(fill='blur'), 'road'), (dict(fill=math.inf), 'fill'),
    (dict(order='up'), 'morf'), (dict(seed=-1), 'seed'), (dict(batch_size=0), 'batch_size'), (dict(model=lambda x: x), 'learn.model'),
    (dict(data=(X,)), 'labels'), (dict(data=(X, None)), 'label'), (dict(data=X), 'DataLoader'), (dict(data=(X[:0], Y[:0])), 'non-empty'),
    (dict(data=(X, Y[:5])), 'each of the 23'), (dict(data=(X, Y.float())), 'whole-number'), (dict(data=(X.mul(9).byte(), Y)), 'float'),
    (dict(data=(X[0], Y)), 'N x C x H x W'), (dict(data=(X, Y + 9)), '4 classes'), (dict(data=(X, Y - 9)), 'start at 0'),
    (dict(data=torch.utils.data.DataLoader(list(zip(X, Y)), batch_size=5, drop_last=True)), 'drop_last'),
    (dict(data=torch.utils.data.DataLoader(X, batch_size=5)), 'no labels'),
    (dict(attribution=lambda m, xb, yb: xb[..., :3]), 'shape'), (dict(attribution=lambda m, xb, yb: None), 'shape'),
    (dict(attribution=lambda m, xb, yb: xb*math.nan), 'NaN')])
def test_bad_input(kw, says):
    kw = dict(kw)
    model, data = kw.pop('model', None) or small_net(), kw.pop('data', (X, Y))
    with pytest.raises(BadInput, match=says): masking_curve(model, data, **kw)


def test_more_bad_input():
    net = small_net()
    dls = get_dls('mnist', sample=True, device='cpu')
    with pytest.raises(BadInput, match='dls.test'): predict(net, dls)
    with pytest.raises(BadInput, match='row of logits'): predict(nn.Conv2d(1, 1, 1), (X, Y))
    with pytest.raises(BadInput, match='at least one'): masking_curves(net, (X, Y), ())
    with pytest.raises(BadInput, match='attr_kw'): masking_curves(net, (X, Y), attr_kw=dict(smoothgrad={}))
    df = masking_curves(net, (X, Y), fracs=(.1, .2))
    with pytest.raises(BadInput, match='measure it first'): select_curve(df, fill='mean')
    with pytest.raises(BadInput, match='no level 0'): masking_auc(df[:2])
    assert math.isnan(masking_curve(net, (X, Y), fracs=(.1, .2)).attrs['auc'])
    a, b = masking_curve(net, (X, Y)), masking_curve(net, (X, Y), 'random', fill='mean')
    with pytest.raises(BadInput, match='fill'): random_gap(a, b)


def test_wishes_are_checked_before_the_model_is_called():
    class Never(nn.Module):
        def forward(self, x): raise AssertionError('called')
    for kw in (dict(fracs=(0, 1.)), dict(fill='blur'), dict(attribution='nope'), dict(order='up')):
        with pytest.raises(BadInput): masking_curve(Never(), (X, Y), **kw)


def test_auc_by_hand():
    df = pd.DataFrame(dict(frac=[.2, 0., .1], accuracy=[.2, .8, .4]))  # out of order
    assert masking_auc(df) == pytest.approx((.1*(.8 + .4)/2 + .1*(.4 + .2)/2)/(.8*.2))
    assert math.isnan(masking_auc(df.assign(accuracy=0.))) and math.isnan(masking_auc(df[1:2]))


def road_exact(img, mask):
    "Rong et al.'s equations, pixel by pixel, solved exactly."
    from scipy.sparse import lil_matrix
    from scipy.sparse.linalg import spsolve
    at = {p: i for i, p in enumerate(zip(*np.nonzero(mask)))}
    A, b = lil_matrix((len(at), len(at))), np.zeros(len(at))
    for (r, c), i in at.items():
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                q, w = (r + dr, c + dc), 1/12 if dr and dc else 1/6
                if (dr, dc) == (0, 0) or not (0 <= q[0] < img.shape[0] and 0 <= q[1] < img.shape[1]): continue
                A[i, i] += w
                if q in at: A[i, at[q]] -= w
                else: b[i] += w*img[q]
    out = img.astype(float).copy()
    out[mask] = spsolve(A.tocsr(), b)
    return out


@pytest.mark.parametrize('frac', [.1, .5, .9, .999])
def test_road_solves_its_equations(frac):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 28, 20, generator=g)*3 + 10
    rank = pixel_rank(torch.rand(3, 28, 20, generator=g))
    rank[0] = torch.arange(560).view(28, 20)  # one hole with a single border
    mask = rank < int(frac*560)
    got = road_fill(x, mask, noise=0).numpy()
    want = np.stack([[road_exact(c.numpy(), m.numpy()) for c in i] for i, m in zip(x, mask)])
    assert np.abs(got - want).max() < .02 and np.abs(got - want).mean() < 1e-3  # of values of about 10
    keep = ~mask[:, None].expand_as(x).numpy()
    assert (got[keep] == x.numpy()[keep]).all()


def test_road_noise_and_edges():
    x = torch.full((50, 1, 12, 12), 2.)
    mask = pixel_rank(torch.rand(50, 12, 12)) < 100
    out = road_fill(x, mask, generator=torch.Generator().manual_seed(0))
    noise = (out - 2)[mask[:, None]]
    assert abs(noise.mean()) < 1e-3 and noise.std().item() == pytest.approx(.01, rel=.05)
    assert torch.equal(road_fill(x, mask & False), x) and torch.equal(road_fill(x*0, mask, noise=0), x*0)
    with pytest.raises(BadInput, match='every pixel'): road_fill(x, mask | True)
    with pytest.raises(BadInput, match='mask'): road_fill(x, mask[:, None])
    with pytest.raises(RuntimeError, match='not solved'): road_fill(torch.randn(50, 1, 12, 12), mask, max_iter=2)


def test_memory_is_flat_in_the_number_of_images():
    "The largest batch of anything that the model sees does not grow with the data."
    sizes = []
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()
        def forward(self, x):
            sizes.append(len(x))
            return self.net(x)
    for n in (64, 640):
        sizes.clear()
        masking_curve(Spy(), small_data(n=n), batch_size=32)
        assert max(sizes) == 32 and sum(sizes) == 10*n  # ten passes in all: the gradient's forward is level 0


def ssim_loops(a, b):
    a, b = [(o - o.min())/(o.max() - o.min()) for o in (a, b)]
    g = np.array([[math.exp(-((i - 5)**2 + (j - 5)**2)/4.5) for i in range(11)] for j in range(11)])
    g, vals = g/g.sum(), []
    for r in range(a.shape[0] - 10):
        for c in range(a.shape[1] - 10):
            p, q = a[r:r+11, c:c+11], b[r:r+11, c:c+11]
            mp, mq = (g*p).sum(), (g*q).sum()
            vp, vq, pq = (g*(p - mp)**2).sum(), (g*(q - mq)**2).sum(), (g*(p - mp)*(q - mq)).sum()
            vals.append((2*mp*mq + 1e-4)*(2*pq + 9e-4)/((mp**2 + mq**2 + 1e-4)*(vp + vq + 9e-4)))
    return np.mean(vals)


def test_similarities_against_loops():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(0)
    a = rng.random((4, 15, 13)).round(1)  # ties
    b = a + .3*rng.random(a.shape)
    assert np.allclose(map_similarity(a, b, 'spearman'), [spearmanr(p.ravel(), q.ravel()).statistic for p, q in zip(a, b)])
    assert np.allclose(map_similarity(a, b, 'ssim'), [ssim_loops(p, q) for p, q in zip(a, b)])
    top = lambda m: set(np.argsort(-m.ravel(), kind='stable')[:19])
    assert np.allclose(map_similarity(a, b, 'topk'), [len(top(p) & top(q))/19 for p, q in zip(a, b)])
    for bad, says in (((a, b[:2]), 'same images'), ((a[0], b[0]), 'N x H x W'), ((a*np.nan, b), 'NaN')):
        with pytest.raises(BadInput, match=says): map_similarity(*bad)
    with pytest.raises(BadInput, match='11 x 11'): map_similarity(a[:, :9], b[:, :9], 'ssim')
    with pytest.raises(BadInput, match='similarity|method'): map_similarity(a, b, 'cosine')
    with pytest.raises(BadInput, match='top'): map_similarity(a, b, 'topk', top=.001)


def test_clarity_against_loops():
    a = np.random.default_rng(1).standard_normal((3, 6, 7))
    for m, tv, sh, gi in zip(a, total_variation(a), sharpness(a), gini(a)):
        m = np.abs(m)/np.abs(m).max()
        h = [abs(m[r, c + 1] - m[r, c]) for r in range(6) for c in range(6)]
        v = [abs(m[r + 1, c] - m[r, c]) for r in range(5) for c in range(7)]
        lap = [m[r-1, c] + m[r+1, c] + m[r, c-1] + m[r, c+1] - 4*m[r, c] for r in range(1, 5) for c in range(1, 6)]
        diff = sum(abs(p - q) for p in m.ravel() for q in m.ravel())/(2*42**2*m.mean())
        assert np.allclose([tv, sh, gi], [np.mean(h) + np.mean(v), np.var(lap), diff])


def test_sanity_check_cascades_from_the_last_layer_and_keeps_the_model():
    net, (x, y) = small_net(), small_data()
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    df = sanity_check(net, x, y)
    assert df.layer.tolist() == ['none', '5', '0'] and df.similarity[0] == pytest.approx(1) and df.similarity[2] < .7
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    pd.testing.assert_frame_equal(df, sanity_check(net, x, y))
    assert not df.similarity.equals(sanity_check(net, x, y, seed=1).similarity)
    blind = sanity_check(net, x, y, lambda m, xb, yb: xb.abs(), 'topk')
    assert (blind.similarity == 1).all()
    with pytest.raises(BadInput, match='no layer'): sanity_check(Linear(torch.zeros(1, 9, 9)), x, y.clamp(max=1))


def test_wilson_published_and_scipy():
    from scipy.stats import binomtest
    for k, n, lo, hi in ((81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611), (1, 29, .0061, .1718)):  # Newcombe 1998
        assert wilson_interval(k, n) == pytest.approx((lo, hi), abs=5.1e-5)
    for k, n in ((0, 1), (1, 1), (5, 10), (9893, 10000)):
        for level in (.9, .95, .99):
            ci = binomtest(k, n).proportion_ci(level, 'wilson')
            assert wilson_interval(k, n, level) == pytest.approx((ci.low, ci.high), abs=1e-12)
    for bad in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(BadInput): wilson_interval(*bad)
    with pytest.raises(BadInput, match='level'): wilson_interval(1, 2, 1.)


def test_intervals_over_seeds():
    from scipy import stats
    v = [.9, .93, .91, .96]
    ci = stats.ttest_1samp(v, 0).confidence_interval(.95)
    assert mean_interval(v) == pytest.approx((np.mean(v), ci.low, ci.high))
    one = mean_interval([.9])
    assert one[0] == .9 and math.isnan(one[1]) and math.isnan(one[2])
    d = paired_difference(pd.Series([3., 1, 2], [0, 1, 2]), pd.Series([1., 0, 9], [1, 0, 5]))
    assert d['n'] == 2 and d['mean'] == pytest.approx(np.mean([3 - 0, 1 - 1]))
    a, b = np.array(v), np.array([.88, .9, .92, .93])
    assert paired_difference(a, b)['p'] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert math.isnan(paired_difference([1.], [2.])['low']) and math.isnan(paired_difference([1., 2], [0., 1])['p'])
    for bad in (([1., 2], [1.]), (pd.Series([1.], [0]), pd.Series([1.], [1])), (pd.Series([1., 2], [0, 0]), pd.Series([1.], [0]))):
        with pytest.raises(BadInput): paired_difference(*bad)
    with pytest.raises(BadInput): mean_interval([])
    with pytest.raises(BadInput): mean_interval([.9, math.nan])
    v = np.random.default_rng(0).standard_normal(400)
    mean, lo, hi = bootstrap_interval(v)
    assert (lo, hi) == pytest.approx(mean_interval(v)[1:], abs=.01) and bootstrap_interval(v) == (mean, lo, hi)
    assert math.isnan(bootstrap_interval([1.])[1])


def test_star_import_leaves_fastais_accuracy_alone():
    assert 'accuracy' not in M.__all__ and callable(M.accuracy)


@pytest.mark.parametrize('fill', ['corner', 'road'])
def test_right_or_wrong_per_image(fill):
    "Row by row the mean is the accuracy, image by image it is what the network says alone, in the data's order."
    net, (x, y) = small_net(), small_data(n=61)
    df, right = masking_curves(net, (x, y), ('gradient', 'random'), fracs=(0, .3, .6), fills=(fill, 'mean'), orders=('morf', 'lerf'), batch_size=9, return_correct=True)
    assert right.dtype == bool and right.shape == (len(df), 61) and right.mean(1).tolist() == df.accuracy.tolist()
    plain = masking_curves(net, (x, y), ('gradient', 'random'), fracs=(0, .3, .6), fills=(fill, 'mean'), orders=('morf', 'lerf'))
    pd.testing.assert_frame_equal(df, plain)
    logits, _ = predict(net, (x, y))
    assert (right[df.frac == 0] == (logits.argmax(1) == y).numpy()).all()
    one = df[(df.attribution == 'gradient') & (df.fill == fill) & (df.order == 'lerf')]
    curve, levels = masking_curve(net, (x, y), fracs=(0, .3, .6), fill=fill, order='lerf', return_correct=True)
    assert (levels == right[one.index]).all() and levels.mean(1).tolist() == curve.accuracy.tolist()


def test_a_shuffling_loader_is_measured_in_order():
    net, (x, y) = small_net(), small_data(n=61)
    shuffling = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=9, shuffle=True)
    want, right = masking_curve(net, (x, y), 'random', fill='random', return_correct=True)
    got, same = masking_curve(net, shuffling, 'random', fill='random', return_correct=True)
    pd.testing.assert_frame_equal(got, want)
    assert (same == right).all()
