"What a converted network keeps, what its layers may be, and who writes their weights."
import copy, pickle

import pytest, torch
from torch import nn

from qisal.core import BadInput
from qisal.models import small_cnn
from qisal.quant import InputQuant, bit_policy, convert

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
