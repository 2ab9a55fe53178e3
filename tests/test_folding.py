"Batch norm folded into the convolutions: before training, in its middle, and after it. The embedded digits only."
import copy
import fastai.callback.schedule  # puts fit_one_cycle into Learner
import numpy as np
import pytest, torch
from fastai.learner import Learner
from torch import nn
from qisal.callback.pact import PACTCallback
from qisal.core import BadInput, set_seed
from qisal.data import get_dls
from qisal.deploy import export_model, first_difference, fold_batchnorm, integer_network, layer_codes, onnx_session
from qisal.models import resnet20
from qisal.quant import bake, bit_policy, calibrate, convert, pacts, quant_layers, strip

pytestmark = pytest.mark.usefixtures('one_thread')

def norms(m): return [o for o in m.modules() if isinstance(o, nn.BatchNorm2d)]

def logits(m, x):
    with torch.no_grad(): return m.eval()(x)

def digits(n_train=256): return get_dls('mnist', sample=True, n_train=n_train, batch_size=32, device='cpu')

def fit(model, lr=2e-3, n_train=256, calibrated=True, bits=None, **kw):
    "Train for some steps, with PACT if bits are given; the network in evaluation mode."
    set_seed(0)
    dls = digits(n_train)
    learn = Learner(dls, model, cbs=PACTCallback.from_bits(bits, alpha_lr=1e-2, **kw) if bits else None)
    if bits and calibrated: calibrate(learn.model, dls.train.one_batch()[0])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, lr)
    return learn.model.eval()

@pytest.fixture(scope='module')
def images(): return torch.cat([b[0] for b in digits().test])

@pytest.fixture(scope='module')
def floats():
    "A float ResNet-20 after some steps: its batch norms have weights, biases and statistics of their own."
    set_seed(0)
    m = fit(resnet20(10, 1, 28), n_train=1024)
    for o in norms(m): assert not torch.equal(o.running_mean, torch.zeros_like(o.running_mean)) and not torch.equal(o.weight, torch.ones_like(o.weight))
    return m

@pytest.fixture(scope='module')
def trained(floats): return {bits: fit(copy.deepcopy(floats), bits=bits) for bits in ('4', '2')}

# --- the float network ---

def test_a_folded_float_network_is_the_same(floats, images):
    f = fold_batchnorm(floats)
    assert not norms(f) and len(norms(floats)) == 19 and not f.training
    want, got = (logits(copy.deepcopy(m).double(), images[:200].double()) for m in (floats, f))
    assert (got - want).abs().max() < 1e-5*want.std()
    assert torch.equal(got.argmax(1), want.argmax(1))

CONVS = {'a bias': dict(bias=True), 'no bias': dict(bias=False), 'strides and groups': dict(bias=True, stride=2, groups=2)}
NORMS = {'learned': dict(), 'a large eps': dict(eps=.5), 'no weight': dict(affine=False)}

@pytest.mark.parametrize('conv', CONVS)
@pytest.mark.parametrize('norm', NORMS)
def test_each_kind_of_norm_and_convolution(conv, norm):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, **CONVS[conv]), nn.BatchNorm2d(8, **NORMS[norm]), nn.ReLU())
    x = torch.randn(6, 4, 7, 7)
    if m[1].affine:
        nn.init.normal_(m[1].weight); nn.init.normal_(m[1].bias)
        m[1].weight.data[:2] = torch.tensor([0., -1.])
    with torch.no_grad(): m.train()(x)  # statistics
    want, got = logits(m, x), logits(fold_batchnorm(m), x)
    assert torch.allclose(got, want, atol=2e-5) and want.std() > .1
    assert torch.equal(want, logits(m, x)) and len(norms(m)) == 1  # `m` stays as it was

def test_statistics_of_a_batch_cannot_be_folded():
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    with pytest.raises(BadInput, match='1 \\(BatchNorm2d\\) keeps no running statistics'): fold_batchnorm(m)

# --- folded before training ---

@pytest.mark.parametrize('bits,per_channel', [('4', False), ('2', True)])
def test_a_folded_network_trains_and_ships(floats, images, tmp_path, bits, per_channel):
    before = fold_batchnorm(floats)
    m = fit(copy.deepcopy(before), lr=1e-3, n_train=512, bits=bits, per_channel=per_channel)
    assert len(quant_layers(m)) == 20 and len(pacts(m)) == 20 and not norms(m)
    nn.functional.cross_entropy(m(images[:32]), torch.arange(32) % 10).backward()
    for name, o in quant_layers(m).items():  # every weight and every bias that took over a norm was trained
        was = before.get_submodule(name)
        assert not torch.equal(o.weight, was.weight) and not torch.equal(o.bias, was.bias), name
        assert o.weight.grad.abs().sum() > 0 and o.bias.grad.abs().sum() > 0, name
    y = torch.cat([b[1] for b in digits().test])
    if bits == '4': assert (logits(m, images).argmax(1) == y).float().mean() > .3  # chance is 0.1; for 2 bits some steps are too few
    net = integer_network(m, (1, 28, 28))
    x = images[:100]
    got, want = net(x), logits(m, x).numpy()
    d = first_difference(m, net, x)
    assert d is None or d['tie'] < 2e-4, d
    assert (got.argmax(1) != want.argmax(1)).sum() <= 1
    folder = export_model(bake(m), tmp_path/'m', classes=list('0123456789'), n_in=1, size=28, stats=([.1307], [.3081]))
    assert np.array_equal(onnx_session(folder/'model.onnx').run(None, {'image': x.numpy()})[0], got)

# --- folded in the middle of training ---

def test_folding_the_latent_network_keeps_the_codes(floats, images):
    "SAWB with a scale for each channel: a channel times a factor has the same codes, so one can fold, convert again and train on."
    m = fit(copy.deepcopy(floats), bits='4', per_channel=True)
    again = convert(fold_batchnorm(strip(m)), bit_policy('4'), images[:2], per_channel=True, input_range=digits().input_range)
    for name, o in pacts(m).items(): again.get_submodule(name).alpha.data.copy_(o.alpha.data)
    same = []
    for name, o in quant_layers(m).items():
        codes, new = layer_codes(o)[0], layer_codes(again.get_submodule(name))[0]
        shape = (-1, *[1]*(codes.ndim - 1))
        sign = np.ones(len(codes)) if name == '14' else norm_of(m, name).weight.detach().sign().numpy()
        same.append((new == codes*sign.reshape(shape)).mean())
    assert min(same) > .999  # a weight on a tie may go to its other side
    assert np.mean((logits(again, images).argmax(1) == logits(m, images).argmax(1)).numpy()) > .98
    on = fit(again, lr=5e-4, calibrated=False, bits='4', per_channel=True)
    assert all(o.per_channel and not o.baked for o in quant_layers(on).values())

def norm_of(m, conv): return m.get_submodule(conv.replace('conv', 'bn') if 'conv' in conv else '1')

# --- folded after training ---

@pytest.mark.parametrize('bits', ['4', '2'])
def test_folding_a_trained_quantized_network_keeps_its_outputs(trained, images, bits):
    m = trained[bits]
    f = fold_batchnorm(m)
    assert not norms(f) and len(quant_layers(f)) == 20
    for name, o in quant_layers(m).items():
        codes, scale = layer_codes(o)
        new, new_scale = layer_codes(f.get_submodule(name))
        flipped = (new == -codes).reshape(len(codes), -1).all(1)
        assert ((new == codes).reshape(len(codes), -1).all(1) | flipped).all() and (new_scale > 0).all(), name
    want, got = logits(m, images), logits(f, images)
    same = ((got - want).abs().max(1).values < 1e-3*want.std()).float().mean().item()
    assert same > .8, same  # the others stood on a tie somewhere
    y = torch.cat([b[1] for b in digits().test])
    points = 100*((got.argmax(1) == y).float().mean() - (want.argmax(1) == y).float().mean()).abs().item()
    assert points <= .2 + 1e-4, points
    a, b = (integer_network(o, (1, 28, 28))(images[:50]) for o in (m, f))
    assert np.array_equal(a, b)  # the integer network folds by itself: the same network
