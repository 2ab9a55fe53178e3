"""ROAD's fill against a sparse direct solve, by both of its solvers: C++ where it compiles, torch elsewhere."""
import itertools

import numpy as np, pytest, torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import spsolve

import qisal.metrics as M
from qisal.core import BadInput
from qisal.metrics import masking_curves, pixel_rank, road_fill
from qisal.quant import has_compiler
from qisal.saliency import n_masked, standard_normal


@pytest.fixture(params=['compiled', 'torch'])
def solver(request, monkeypatch):
    "Both solvers in turn."
    if request.param == 'torch': monkeypatch.setattr(M, '_compiled_road', lambda: None)
    elif not has_compiler(): pytest.skip('no C++ compiler')
    return request.param


def exact(x, mask):
    "Each removed pixel is the weighted mean of its neighbours: all equations of all channels, solved directly in float64."
    out = x.double().numpy().copy()
    for img, m in zip(out, mask.numpy()):
        at = np.full(m.shape, -1)
        at[m] = np.arange(m.sum())
        row, col, val, b = [], [], [], np.zeros((m.sum(), len(img)))
        for r, c in zip(*np.nonzero(m)):
            for dr, dc in itertools.product((-1, 0, 1), repeat=2):
                q, w = (r + dr, c + dc), 1/12 if dr and dc else 1/6
                if (dr, dc) == (0, 0) or not (0 <= q[0] < m.shape[0] and 0 <= q[1] < m.shape[1]): continue
                row.append(at[r, c]), col.append(at[r, c]), val.append(w)
                if m[q]: row.append(at[r, c]), col.append(at[q]), val.append(-w)
                else: b[at[r, c]] += w*img[(slice(None), *q)]
        if m.any(): img[:, m] = spsolve(csr_matrix((val, (row, col))).tocsc(), b).reshape(b.shape).T
    return torch.from_numpy(out)


def images(n, c, h, w, seed=0):
    "Each channel has the range 4, about that of normalized photographs."
    x = torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed))
    lo, hi = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - lo)/(hi - lo)*4 - 2


def ranks(n, h, w, kind, seed=1):
    noise = torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed))
    far = torch.maximum(torch.arange(h).sub(h/2.3).abs()[:, None], torch.arange(w).sub(w/1.7).abs())
    return pixel_rank(-noise if kind == 'scattered' else far + noise, 'lerf')


@pytest.mark.parametrize('c,h,w', [(1, 28, 28), (3, 32, 32), (2, 7, 19), (1, 23, 5)])
@pytest.mark.parametrize('kind', ['scattered', 'one hole'])
def test_all_levels_solve_the_equations(solver, c, h, w, kind):
    x, rank = images(2, c, h, w), ranks(2, h, w, kind)
    for f in range(1, 10):
        mask = rank < n_masked(f/10, h*w)
        got = road_fill(x, mask, noise=0)
        assert got.dtype == x.dtype and (got - exact(x, mask)).abs().max() < 1e-4, f
        keep = ~mask[:, None].expand_as(x)
        assert torch.equal(got[keep], x[keep])


def edge_masks(h, w):
    full = torch.ones(h, w, dtype=torch.bool)
    def mask(*at, rest):
        m = full if rest else ~full
        m = m.clone()
        for p in at: m[p] = not rest
        return m
    yield 'all but a corner', mask((0, 0), rest=True)
    yield 'all but one inside', mask((h//2, w//2), rest=True)
    yield 'all but two far ones', mask((0, 0), (h - 1, w - 1), rest=True)
    yield 'nothing', ~full
    yield 'first row', mask((0, slice(None)), rest=False)
    yield 'a row inside', mask((h//2, slice(None)), rest=False)
    yield 'last column', mask((slice(None), w - 1), rest=False)
    yield 'isolated', mask((slice(None, None, 2), slice(None, None, 2)), rest=False)
    yield 'all but isolated', mask((slice(None, None, 3), slice(None, None, 3)), rest=True)
    yield 'one corner', mask((h - 1, w - 1), rest=False)


@pytest.mark.parametrize('h,w', [(28, 28), (9, 13)])
def test_edges(solver, h, w):
    names, masks = zip(*edge_masks(h, w))
    x, mask = images(len(masks), 2, h, w), torch.stack(masks)
    error = (road_fill(x, mask, noise=0) - exact(x, mask)).abs().amax((1, 2, 3))
    assert (error < 1e-4).all(), dict(zip(names, error.tolist()))
    assert torch.equal(road_fill(x*0, mask, noise=0), x*0) and torch.equal(road_fill(x, mask & False), x)
    flat = torch.full_like(x, .3)
    assert torch.equal(road_fill(flat, mask, noise=0), flat)  # exactly: nothing is left to solve
    with pytest.raises(BadInput, match='every pixel'): road_fill(x, mask | True)


@pytest.mark.parametrize('h,w', [(1, 12), (12, 1), (1, 2), (2, 2)])
def test_thin_images(solver, h, w):
    x = images(3, 1, h, w)
    mask = ranks(3, h, w, 'scattered') < h*w - 1
    assert (road_fill(x, mask, noise=0) - exact(x, mask)).abs().max() < 1e-4


@pytest.mark.parametrize('scale,shift', [(1e-20, 0), (1e-6, 0), (60, 120), (1e18, 0)])
def test_units_do_not_matter(solver, scale, shift):
    x, mask = images(3, 1, 28, 28), ranks(3, 28, 28, 'scattered') < 600
    got = road_fill(x*scale + shift, mask, noise=0)
    assert (((got.double() - shift)/scale) - exact(x, mask)).abs().max() < 1.1e-4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(solver, dtype):
    x, mask = images(4, 3, 16, 16).to(dtype), ranks(4, 16, 16, 'one hole') < 200
    got = road_fill(x, mask, noise=0)
    assert got.dtype == dtype and torch.equal(got, road_fill(x.float(), mask, noise=0).to(dtype))


def test_float64_keeps_its_digits(solver):
    x, mask = images(2, 1, 16, 16).double(), ranks(2, 16, 16, 'one hole') < 200
    got = road_fill(x, mask, noise=0, tol=1e-11)
    assert got.dtype == torch.float64 and (got - exact(x, mask)).abs().max() < 1e-10


def test_an_image_does_not_see_its_batch(solver):
    x = images(9, 2, 20, 20)
    mask = ranks(9, 20, 20, 'scattered') < torch.tensor([0, 4, 40, 80, 160, 320, 390, 398, 399]).view(-1, 1, 1)  # easy to hard
    together = road_fill(x, mask, noise=0)
    for i in range(9): assert (road_fill(x[i:i+1], mask[i:i+1], noise=0)[0] - together[i]).abs().max() < 1e-6
    spoilt = x.clone()
    spoilt[4, 0, 3, 3] = torch.nan
    spoilt[5, 1] = torch.inf
    mask[4, 3, 3] = mask[5, 0, 0] = False
    got = road_fill(spoilt, mask, noise=0)
    others = [0, 1, 2, 3, 6, 7, 8]
    assert (got[others] - together[others]).abs().max() < 1e-6 and got[4, 0][mask[4]].isnan().all() and got[4, 1].isfinite().all()


def test_memory_layout_and_threads_do_not_matter(solver):
    x, mask = images(5, 3, 16, 12), ranks(5, 16, 12, 'one hole') < 150
    want, threads = road_fill(x, mask, noise=0), torch.get_num_threads()
    assert torch.equal(road_fill(x.to(memory_format=torch.channels_last), mask, noise=0), want)
    assert torch.equal(road_fill(x, mask.transpose(1, 2).contiguous().transpose(1, 2), noise=0), want)
    try:
        torch.set_num_threads(3)
        assert (road_fill(x, mask, noise=0) - want).abs().max() < 1e-6 and (road_fill(x[:1], mask[:1], noise=0) - want[:1]).abs().max() < 1e-6
    finally: torch.set_num_threads(threads)


def test_both_solvers_agree(monkeypatch):
    if not has_compiler(): pytest.skip('no C++ compiler')
    x, rank = images(6, 3, 32, 32), ranks(6, 32, 32, 'one hole')
    for k in (102, 512, 921):
        with monkeypatch.context() as p:
            fast = road_fill(x, rank < k, noise=0)
            p.setattr(M, '_compiled_road', lambda: None)
            assert (fast - road_fill(x, rank < k, noise=0)).abs().max() < 2e-5


def test_the_noise_is_the_generators(solver):
    x, mask = images(5, 2, 12, 12), ranks(5, 12, 12, 'scattered') < 100
    got = road_fill(x, mask, generator=torch.Generator().manual_seed(3)) - road_fill(x, mask, noise=0)
    want = .01*standard_normal(x.shape, torch.Generator().manual_seed(3))
    assert torch.allclose(got, torch.where(mask[:, None], want, 0*want), atol=1e-6, rtol=0)


def test_too_few_iterations_are_an_error(solver):
    x, mask = images(50, 1, 12, 12), ranks(50, 12, 12, 'scattered') < 100
    with pytest.raises(RuntimeError, match='50 channels of images are not solved after 2'): road_fill(x, mask, max_iter=2)


def test_without_a_compiler_torch_solves(monkeypatch, tmp_path, recwarn):
    build = M._compiled_road.__wrapped__
    monkeypatch.setenv('CXX', str(tmp_path/'missing'))
    assert build() is None and not recwarn.list
    broken = tmp_path/'broken'
    broken.write_text('#!/bin/sh\necho no such flag >&2\nexit 1\n', encoding='utf-8')
    broken.chmod(0o755)
    monkeypatch.setenv('CXX', str(broken))
    with pytest.warns(UserWarning, match='no such flag.*torch solves instead'): assert build() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda():
    x, rank = images(40, 3, 32, 32), ranks(40, 32, 32, 'scattered')
    for k in (102, 512, 921):
        got = road_fill(x.cuda(), (rank < k).cuda(), noise=0)
        assert got.is_cuda and (got.cpu() - exact(x, rank < k)).abs().max() < 1e-4
    torch.manual_seed(0)
    net, y = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(3600, 10)).double(), torch.arange(40) % 10
    kw = dict(attributions=('random',), fills=('road', 'corner'), orders=('morf', 'lerf'), return_correct=True)  # an order without rounding
    (df, here), (_, there) = [masking_curves(net.to(d), (x.double(), y), **kw) for d in ('cpu', 'cuda')]  # many levels at once there, one here
    road = (df.fill == 'road').to_numpy()
    assert (here[~road] == there[~road]).all()
    assert (here[road] != there[road]).mean() < .01  # fills that differ by 1e-4 may part two logits that are as near to each other
