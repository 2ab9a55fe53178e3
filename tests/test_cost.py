"The cost count against sums made by brute force, and its edges."
import numpy as np, pytest, torch
from torch import nn
from qisal.core import BadInput
from qisal.cost import cost_table, count_cost
from qisal.models import get_model, small_cnn
from qisal.quant import bit_policy, convert

def brute_conv(h, w, c_in, c_out, k, stride, pad, dilation, groups):
    "Multiplications of a convolution, counted one output value at a time; padded zeros are multiplied too."
    n = 0
    for y in range(0, h + 2*pad - dilation*(k - 1), stride):
        for x in range(0, w + 2*pad - dilation*(k - 1), stride):
            window = np.ones((c_in//groups, k, k))
            n += c_out*int(window.sum())
    return n

@pytest.mark.parametrize('kw', [dict(), dict(stride=2), dict(padding=1), dict(dilation=2), dict(groups=2), dict(stride=3, padding=2, groups=4)])
def test_conv_macs_against_brute_force(kw):
    m = nn.Sequential(nn.Conv2d(4, 8, 3, **kw))
    want = brute_conv(11, 9, 4, 8, 3, kw.get('stride', 1), kw.get('padding', 0), kw.get('dilation', 1), kw.get('groups', 1))
    assert count_cost(m, torch.zeros(3, 4, 11, 9))['macs'] == want

# MACs for one image; small_cnn and ResNet-20 as fvcore counts them (it calls a MAC a flop), ResNet-20 without its pooling and batch norm
@pytest.mark.parametrize('arch,n_in,size,params,macs', [('small_cnn', 1, 28, 1_199_882, 11_992_448), ('lenet5', 1, 28, 61_706, 416_520), ('resnet20', 3, 32, 269_722, 40_551_040)])
def test_known_networks(arch, n_in, size, params, macs):
    c = count_cost(get_model(arch, n_in=n_in, size=size), torch.zeros(1, n_in, size, size))
    assert (c['params'], c['macs'], c['bops']) == (params, macs, macs*1024)
    assert c['weight_bytes'] >= params*4

@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('bits', ['8', '4', '3', '2', '4/2', 'w2a4', 'w4a2'])
def test_quantized_small_cnn_by_hand(bits, per_channel):
    xb = torch.rand(2, 1, 28, 28)
    c = count_cost(convert(small_cnn(), bit_policy(bits), xb, per_channel=per_channel), xb)
    inner = {'4/2': [(4, 4), (2, 2)], 'w2a4': [(2, 4)]*2, 'w4a2': [(4, 2)]*2}.get(bits) or [(int(bits),)*2]*2
    widths = np.array([(8, 8), *inner, (8, 8)])
    n = np.array([32*9, 64*32*9, 9216*128, 1280]); macs = np.array([26*26*32*9, 24*24*64*32*9, 9216*128, 1280])
    scales = 32 + 64 + 128 + 10 if per_channel else 4
    rest = 32*((32 + 64 + 128 + 10) + 3 + scales + 1)  # biases, alphas, weight scales, the image's scale
    assert c['weight_bits'] == (n*widths[:, 0]).sum() + rest
    assert c['bops'] == (macs*widths[:, 0]*widths[:, 1]).sum()
    assert c['bits_per_weight'] == pytest.approx(((n*widths[:, 0]).sum() + rest)/n.sum())
    assert c['weight_bytes'] == -(-c['weight_bits']//8)

def test_batch_norm_and_unbiased_layers_are_counted():
    m = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    assert count_cost(m, torch.zeros(2, 1, 8, 8))['weight_bits'] == 32*(36 + 4*4)  # weight, bias, mean, variance; not the step counter

def test_model_is_left_as_it_was():
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5)).train()
    m[1].eval()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    count_cost(m, torch.randn(4, 1, 8, 8))
    assert [o.training for o in m] == [True, False, True] and m.training
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    with pytest.raises(RuntimeError): count_cost(m, torch.randn(4, 3, 8, 8))  # wrong channels: torch says so
    assert [o.training for o in m] == [True, False, True] and not any(o._forward_hooks for o in m)

def test_a_layer_used_twice_works_twice_and_is_stored_once():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
        def forward(self, x): return self.a(self.a(x))
    c = count_cost(Twice(), torch.zeros(1, 4))
    assert (c['macs'], c['weight_bits'], c['params']) == (32, 32*20, 20)

def test_unknown_layers_are_named():
    with pytest.raises(BadInput, match=r"layer '1' \(Embedding\)"): count_cost(nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2)), torch.zeros(1, 2))
    with pytest.raises(BadInput, match='no convolution'): count_cost(nn.Flatten(), torch.zeros(1, 2))
    with pytest.raises(BadInput, match='empty batch'): count_cost(small_cnn(), torch.zeros(0, 1, 28, 28))

def test_table_shares_add_up():
    df = cost_table(count_cost(get_model('lenet5'), torch.zeros(1, 1, 28, 28)))
    assert len(df) == 5 and df['macs %'].sum() == pytest.approx(100, abs=.05)
