"What torch's own exporters make of a network of ours. ONNX in a process of its own: a crash there must show as a failure."
import os, subprocess, sys

import numpy as np, pytest, torch
from torch import nn

from qisal.models import get_model
from qisal.quant import bake, bit_policy, convert

SHAPES = dict(small_cnn=(2, 1, 28, 28), lenet5=(2, 1, 28, 28), resnet20=(2, 3, 32, 32))
pytestmark = pytest.mark.filterwarnings('ignore')


def network(arch, baked=True):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[arch])
    m = convert(get_model(arch, n_in=x.shape[1], size=x.shape[2]), bit_policy('4/2'), x).eval()
    with torch.no_grad(): return (bake(m) if baked else m), x, m(x)


@pytest.mark.parametrize('arch', SHAPES)
@pytest.mark.parametrize('baked', [True, False])
def test_jit_trace(arch, baked, tmp_path):
    "Also what TensorBoardCallback(trace_model=True) calls."
    m, x, want = network(arch, baked)
    traced = torch.jit.trace(m, x, strict=False)
    torch.jit.save(traced, tmp_path/'m.pt')
    with torch.no_grad(): assert torch.equal(traced(x), want) and torch.equal(torch.jit.load(tmp_path/'m.pt')(x), want)


def test_jit_trace_in_the_middle_of_training():
    m, x, _ = network('small_cnn', baked=False)
    m.train()
    torch.jit.trace(m, x, strict=False, check_trace=False)
    m.zero_grad()
    m(x).square().sum().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize('arch,baked', [*((a, True) for a in SHAPES), ('small_cnn', False)])
def test_torch_export(arch, baked):
    m, x, want = network(arch, baked)
    with torch.no_grad(): assert torch.equal(torch.export.export(m, (x,)).module()(x), want)


def test_an_alpha_below_its_bound_is_exported_as_it_is_used():
    m, x, _ = network('small_cnn')
    m[1].alpha.data.fill_(-1.)
    traced = torch.jit.trace(m, x, strict=False)
    with torch.no_grad(): assert torch.equal(traced(x), m(x))


CODE = """
import sys, warnings, numpy as np, torch
warnings.filterwarnings('ignore')
sys.path.insert(0, sys.argv[1])
from test_torch_export import network
arch, path, new, baked = sys.argv[2], sys.argv[3], sys.argv[4] == 'True', sys.argv[5] == 'True'
m, x, want = network(arch, baked)
torch.onnx.export(m, (x,), path, dynamo=new, input_names=['image'])
np.savez(path + '.npz', x=x.numpy(), want=want.numpy())
"""


@pytest.mark.parametrize('arch,new,baked', [('small_cnn', True, True), ('resnet20', True, True), *((a, False, True) for a in SHAPES)])  # the new one takes seconds
def test_torch_onnx_export(arch, new, baked, tmp_path):
    "torch's old exporter and its new one; onnxruntime adds up in another order, and in 20 layers a value at a tie may fall to the next level."
    if new: pytest.importorskip('onnxscript')
    import onnxruntime as ort
    path = tmp_path/'m.onnx'
    r = subprocess.run([sys.executable, '-c', CODE, os.path.dirname(__file__), arch, str(path), str(new), str(baked)], capture_output=True, text=True, timeout=300, encoding='utf-8')
    assert r.returncode == 0, r.stderr[-2000:]
    f = np.load(f'{path}.npz')
    got, = ort.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, {'image': f['x']})
    np.testing.assert_allclose(got, f['want'], atol=(5e-3 if arch == 'resnet20' else 1e-5)*np.abs(f['want']).max())
    assert np.array_equal(got.argmax(1), f['want'].argmax(1))


def test_a_network_of_ones_own_is_exported_too():
    "Pooling before the first layer, a residual sum, an input quantizer of its own before the last layer."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.r, self.s = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            y = self.r(self.a(nn.functional.avg_pool2d(x, 2)))
            return self.c((self.s(self.b(y)) + y).mean((2, 3)))
    torch.manual_seed(0)
    x = torch.randn(2, 1, 16, 16)
    m = bake(convert(Net(), bit_policy('4'), x)).eval()
    with torch.no_grad():
        assert torch.equal(torch.export.export(m, (x,)).module()(x), m(x)) and torch.equal(torch.jit.trace(m, x)(x), m(x))
