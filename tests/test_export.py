"The integer network, its ONNX file and the packed weights: for every architecture, policy and quantizer of the study."
import itertools, json, shutil
import numpy as np
import onnx, onnxruntime
import pytest, torch
from torch import nn
import qisal.deploy as deploy
from qisal.core import BadInput
from qisal.data import sample_arrays
from qisal.deploy import (IntLayer, IntSum, IntWeights, export_model, first_difference, float_onnx, fold_batchnorm, integer_network, layer_codes,
    load_model, onnx_graph_ops, pack_codes, to_onnx, unpack_codes)
from qisal.models import get_model
from qisal.quant import InputQuant, PACT, bake, bit_policy, convert, quant_layers

FACTS = dict(classes=[str(i) for i in range(10)], n_in=1, size=28, stats=([.1307], [.3081]))
RANGE = (-.1307/.3081, (1 - .1307)/.3081)

pytestmark = pytest.mark.usefixtures('one_thread')

def digits(n, size=28):
    x = torch.from_numpy(sample_arrays('mnist').x_test[:n]).permute(0, 3, 1, 2).float()/255
    return (x - .1307)/.3081

def calibrate(model, xb):
    "Give each PACT an alpha that some of its inputs reach, in one pass from front to back."
    def hook(m, x):
        positive = x[0][x[0] > 0]
        if len(positive): m.alpha.data.fill_(positive[:200_000].quantile(.98).item())
    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, PACT)]
    with torch.no_grad(): model.eval()(xb)
    for h in hooks: h.remove()
    return model

def network(arch='small_cnn', bits='4', seed=0, **kw):
    "A random network whose batch norms and alphas fit its activations; some gammas are negative, one is zero."
    torch.manual_seed(seed)
    x = digits(64)
    m = convert(get_model(arch, 10, 1, 28), bit_policy(bits), x, input_range=RANGE, **kw)
    with torch.no_grad():
        for o in m.modules():
            if isinstance(o, nn.BatchNorm2d):
                o.weight.uniform_(.5, 1.5); o.bias.normal_(0, .3); o.weight[1] *= -1; o.momentum = None
        m.train()(x)
    return calibrate(m, x)

def session(path, threads=1):
    o = onnxruntime.SessionOptions()
    o.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])

def run(path, x): return session(path).run(None, {'image': np.asarray(x)})[0]

def bias_error(net):
    "Name of each layer with an integer bias to the largest part of an output step by which rounding the bias can move its result."
    res = {}
    for s in net.steps:
        if isinstance(s, IntLayer) and s.grid: res[s.name] = float((s.weights.grid.scale*s.w_scale).max()/s.grid.scale/2)
    return res

def slow(*row): return pytest.param(*row, marks=pytest.mark.slow)

def thinned(*values):
    "All combinations; those are slow that every pair of values can do without: the first two that vary meet all values of each other, the rest go round with their sum."
    lead = [i for i, v in enumerate(values) if len(v) > 1][:2]
    def keeps(at): return all(at[i] == sum(at[j] for j in lead) % len(v) for i, v in enumerate(values) if i not in lead)
    rows = [(at, tuple(v[i] for v, i in zip(values, at))) for at in itertools.product(*(range(len(v)) for v in values))]
    return [row if keeps(at) else slow(*row) for at, row in rows]

def names(rows): return ['-'.join(map(str, getattr(o, 'values', o))).replace('/', '_') for o in rows]

ARCHS3, POLICIES, QUANTIZERS = ('small_cnn', 'lenet5', 'resnet20'), ('2', '4', '4/2', 'w2a4', 'w4a2', '8'), ('sawb', 'sawb_zero', 'dorefa')
ALL = thinned(ARCHS3, POLICIES, QUANTIZERS, (False, True))

def test_every_pair_of_values_is_among_the_quick_combinations():
    for rows, n in ((ALL, 18), (thinned(('lenet5',), POLICIES, QUANTIZERS, (False, True), (8,)), 18), (thinned((2, 3, 4, 5, 8), QUANTIZERS, (False, True)), 15)):
        quick, every = [o for o in rows if type(o) is tuple], [getattr(o, 'values', o) for o in rows]
        assert len(quick) == n and len(set(every)) == len(every)
        for i, j in itertools.combinations(range(len(quick[0])), 2): assert {(o[i], o[j]) for o in quick} == {(o[i], o[j]) for o in every}
    assert len(ALL) == 108

@pytest.mark.parametrize('arch,bits,quantizer,per_channel', ALL, ids=names(ALL))
def test_torch_integers_and_onnx_agree(tmp_path, arch, bits, quantizer, per_channel):
    m = network(arch, bits, weight_quantizer=quantizer, per_channel=per_channel)
    x = digits(200 if arch == 'lenet5' else 32)
    net = integer_network(m, (1, 28, 28))
    got = net(x)
    # 1. where torch and the integers part, it was a tie, within the grid of the bias
    differ = first_difference(m, net, x)
    if differ: assert differ['tie'] <= bias_error(net).get(differ['layer'], 0) + 2e-4*2**(bits == '8'), differ
    with torch.no_grad(): want = m(x).numpy()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > .99
    # 2. onnxruntime gives the same logits, bit for bit, also for one image
    path = to_onnx(net, tmp_path/'m.onnx')
    assert np.array_equal(run(path, x), got) and np.array_equal(run(path, x[:1]), got[:1])
    # 3. and does so with integers
    ops = onnx_graph_ops(path)
    assert not {'Conv', 'FusedConv', 'Gemm', 'FusedGemm', 'MatMul', 'Gather', 'BitShift'} & set(ops), ops
    layers = len(quant_layers(m))
    assert ops.get('QLinearConv', 0) + ops.get('QGemm', 0) + ops.get('ConvInteger', 0) + ops.get('MatMulInteger', 0) == layers
    assert ('ConvInteger' in ops) == (arch == 'resnet20')

@pytest.mark.parametrize('arch,bits', [('small_cnn', '4'), ('small_cnn', '2'), ('lenet5', '4/2'), ('resnet20', '2'), slow('resnet18', '4')])
def test_every_layer_of_the_onnx_graph(tmp_path, arch, bits):
    net, x = integer_network(network(arch, bits), (1, 28, 28)), digits(3)
    m = onnx.load(to_onnx(net, tmp_path/'m.onnx'))
    made = {o for n in m.graph.node for o in n.output}
    codes = net.codes(x)
    names = [k for k in codes if k in made and k != 'logits']
    pooled = {s.src[0] for s in net.steps if isinstance(s, deploy.IntMaxPool)}  # clipped after the pooling
    assert set(codes) - set(names) == {'logits'} | pooled
    kind = {np.dtype('uint8'): onnx.TensorProto.UINT8, np.dtype('int32'): onnx.TensorProto.INT32}
    for k in names: m.graph.output.append(onnx.helper.make_tensor_value_info(k, kind[codes[k].dtype], None))
    onnx.save(m, tmp_path/'open.onnx')
    for s in net.steps:  # flattened with the channels last
        if isinstance(s, deploy.IntFlatten) and s.name in names: codes[s.name] = codes[s.src[0]].transpose(0, 2, 3, 1).reshape(len(x), -1)
    for k, v in zip(names, session(tmp_path/'open.onnx').run(names, {'image': x.numpy()})): assert np.array_equal(v, codes[k]), k

@pytest.mark.parametrize('bits', ['3', '5'])
def test_odd_widths(tmp_path, bits):
    m = network('lenet5', '4')
    m = convert(m, deploy_policy(int(bits)), digits(4), input_range=RANGE)
    net, x = integer_network(m, (1, 28, 28)), digits(50)
    path = to_onnx(net, tmp_path/'m.onnx')
    assert np.array_equal(run(path, x), net(x)) and not {'Gather', 'Conv'} & set(onnx_graph_ops(path))
    weights = sum(o.weight.numel() for n, o in quant_layers(m).items() if o.w_bits != 8)
    assert path.stat().st_size < 13_000 + weights*int(bits)/8

def deploy_policy(bits):
    from qisal.quant import BitPolicy
    return BitPolicy((bits, bits), (bits, bits), 8)

# --- saturation: what AVX2 without VNNI would do with signed weights ---

def pair_sum(w, n):
    "Largest sum of two products of inputs up to `n` with two weights of one output channel (`vpmaddubsw` holds 16 bits)."
    w = w.astype(np.int64)
    if w.ndim == 4 and w.shape[1] == 4 and not w[:, 1:].any(): return int(np.abs(w).max())*n  # three channels of zeros: onnxruntime puts the channels last, so each pair has a zero
    rows = np.sort(w.reshape(len(w), -1), 1)
    return max(abs(int(rows[:, :2].sum(1).min())), int(rows[:, -2:].sum(1).max()))*n

def stored_weights(path, tmp):
    "The weights that onnxruntime multiplies: operator, name of the layer's input, array."
    o = onnxruntime.SessionOptions()
    o.optimized_model_filepath, o.log_severity_level = str(tmp/'o.onnx'), 3
    onnxruntime.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])
    g = onnx.load(tmp/'o.onnx').graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in g.initializer}
    at = dict(QLinearConv=3, QGemm=3, ConvInteger=1, MatMulInteger=1)
    return [(n.op_type, arrays[n.input[at[n.op_type]]]) for n in g.node if n.op_type in at]

def adversarial(bits):
    "Every code at the end of its grid, with signs that add up."
    m = bake(network('small_cnn', bits))
    for name, o in quant_layers(m).items():
        codes, scale = layer_codes(o)
        top = 2**o.w_bits - 1 if o.w_bits != 8 else 127
        codes[:] = np.where(np.arange(len(codes)) % 3 == 0, -top, top).reshape(-1, *[1]*(codes.ndim - 1))
        codes[:, ::7] = 1
        o.weight.data = torch.from_numpy(codes*scale[0])
    return m

@pytest.mark.parametrize('bits', ['2', '4', '8', slow('w2a4'), slow('w4a2')])
def test_no_pair_of_products_saturates(tmp_path, bits):
    for m in (network('small_cnn', bits), adversarial(bits)):
        net = integer_network(m, (1, 28, 28))
        path = to_onnx(net, tmp_path/'m.onnx')
        tops = [w.grid.n for s in net.steps for w in getattr(s, 'terms', (getattr(s, 'weights', None),)) if isinstance(w, IntWeights)]
        found = stored_weights(path, tmp_path)
        assert len(found) == len(tops)
        for n, (op, w) in zip(tops, found):
            assert w.dtype == np.uint8 or pair_sum(w.T if op == 'MatMulInteger' or (op == 'QGemm' and w.shape[0] > w.shape[1]) else w, n) <= 32767, (op, n)
        x = torch.full((4, 1, 28, 28), RANGE[1])
        assert np.array_equal(run(path, x), net(x))
    assert {w.dtype for _, w in found} == {np.dtype('uint8'), np.dtype('int8')} and found[0][1].shape[1] == 4  # three channels of zeros
    assert any(pair_sum((w.astype(int) - 128), 255) > 32767 for _, w in found if w.dtype == np.uint8)  # signed ones would have

def test_session_option_for_exact_products_changes_nothing(tmp_path):
    net, x = integer_network(network('small_cnn', '4'), (1, 28, 28)), digits(20)
    path, o = to_onnx(net, tmp_path/'m.onnx'), onnxruntime.SessionOptions()
    o.add_session_config_entry('session.x64quantprecision', '1')
    s = onnxruntime.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])
    assert np.array_equal(s.run(None, {'image': x.numpy()})[0], net(x))

# --- the integer network itself ---

def test_convolution_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    for stride, padding, zero in ((1, 0, 0), (2, 1, 33), ((1, 2), (2, 0), 255)):
        pair = lambda o: o if isinstance(o, tuple) else (o, o)
        x, w = torch.randint(0, 256, (3, 5, 9, 8), generator=g), torch.randint(-127, 128, (4, 5, 3, 3), generator=g)
        want = nn.functional.conv2d((x - zero).double(), w.double(), stride=stride, padding=padding).long()
        o = IntWeights('w', deploy.IntGrid(1., zero, 255), w.numpy().astype(np.int8), np.ones(4, np.float32), np.zeros(4), 8, 255, pair(stride), pair(padding))
        assert np.array_equal(o.accumulate(x.numpy().astype(np.uint8)), want.numpy())

def test_too_many_products_are_refused():
    w = IntWeights('wide', deploy.IntGrid(1.), np.full((1, 70_000), 127, np.int8), np.ones(1, np.float32), np.zeros(1), 8, 255)
    with pytest.raises(BadInput, match='wide adds up too many products'): w.accumulate(np.zeros((1, 70_000), np.uint8))

def test_accumulators_beyond_float32():
    w = IntWeights('wide', deploy.IntGrid(1.), np.full((1, 9000), 127, np.int8), np.ones(1, np.float32), np.zeros(1), 8, 255)
    x = np.full((1, 9000), 255, np.uint8); x[0, 0] = 254
    assert w.accumulate(x)[0, 0] == 127*(255*9000 - 1)

@pytest.mark.parametrize('arch', ['resnet20', slow('resnet18')])
def test_batchnorm_folds(arch):
    m, x = network(arch, '4'), digits(8)
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): o.weight.data[:2] = torch.tensor([0., -.8])
    f = fold_batchnorm(m)
    assert not any(isinstance(o, nn.BatchNorm2d) for o in f.modules()) and any(isinstance(o, nn.BatchNorm2d) for o in m.modules())
    m, f = m.double(), f.double()
    for a, b in zip(m.modules(), f.modules()):  # compare what rounding can't hide: the layers alone
        if isinstance(a, nn.Conv2d): assert b.weight.shape == a.weight.shape and b.bias is not None
    conv = next(n for n, _ in quant_layers(m).items())
    y = torch.randn(2, *m.get_submodule(conv).weight.shape[1:2], 9, 9).double()
    bn = next(o for o in m.modules() if isinstance(o, nn.BatchNorm2d))
    a, b = m.get_submodule(conv), f.get_submodule(conv)
    a.input_quant = b.input_quant = None
    with torch.no_grad(): assert torch.allclose(bn(a(y)), b(y), atol=1e-5)
    codes, scale = layer_codes(b)
    assert scale[0] == 0 and np.array_equal(codes[1], -layer_codes(network(arch, '4').get_submodule(conv))[0][1])

def test_a_zero_gamma_goes_through(tmp_path):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8*169, 10))
    convert(m, bit_policy('4'), digits(8), input_range=RANGE)
    with torch.no_grad():
        m[1].weight[0], m[1].weight[1], m[1].weight[2] = 0., -1., 1e-12
        m[1].bias.fill_(.3)
    calibrate(m, digits(8))
    net, x = integer_network(m, (1, 28, 28)), digits(20)
    assert isinstance(net.steps[1], IntSum)  # its bias has no integer grid
    with torch.no_grad(): assert np.abs(net(x) - m(x).numpy()).max() < 1e-3
    assert np.array_equal(run(to_onnx(net, tmp_path/'m.onnx'), x), net(x))

@pytest.mark.parametrize('bits,share', [('2', 1.), ('4/2', .95), ('4', .95), ('w2a4', .9)])
def test_stairs_are_where_the_exact_bias_puts_them(bits, share):
    net = integer_network(network('small_cnn', bits), (1, 28, 28))
    right = []
    for s in net.steps:
        if not isinstance(s, IntLayer) or not s.grid: continue
        w, n = s.weights, s.grid.n
        m = np.float32(w.grid.scale)*s.w_scale/np.float32(s.grid.scale)
        rows = w.codes.reshape(len(w.codes), -1).astype(int)
        lo, hi = -w.grid.zero, w.grid.n - w.grid.zero
        for c in range(len(rows)):  # every sum that can be reached
            a = np.arange(np.where(rows[c] > 0, rows[c]*lo, rows[c]*hi).sum(), np.where(rows[c] > 0, rows[c]*hi, rows[c]*lo).sum() + 1)
            exact = np.clip(np.rint((a*float(w.scale[c])*w.grid.scale + w.bias[c])/s.grid.scale), 0, n)
            right.append((np.clip(np.rint((a*w.stretch + s.bias[c]).astype(np.float32)*m[c]), 0, n) == exact).all())
            assert np.abs(np.clip(np.rint((a*w.stretch + s.bias[c]).astype(np.float32)*m[c]), 0, n) - exact).max() <= 1
    assert np.mean(right[32:]) >= share  # the second convolution, which has few-bit inputs

def all_inputs(s):
    "For each channel and each code over the shortcut: the sums next to every tie that can be reached, and a thousand at random; and the codes."
    w = next(t for t in s.terms if isinstance(t, IntWeights))
    beside = next((t for t in s.terms if t is not w))
    codes, step = np.arange(beside.n + 1), w.scale*float(w.grid.scale)
    most = np.abs(w.codes.reshape(len(w.codes), -1).astype(int)).sum(1)*max(w.grid.zero, w.grid.n - w.grid.zero)
    ties = (np.arange(s.grid.n) + .5)*s.grid.scale - (w.bias[:, None] + beside.scale*codes)[..., None]
    near = (np.rint(ties/step[:, None, None])[..., None] + np.arange(-2, 3)).reshape(*ties.shape[:2], -1)
    some = np.random.default_rng(0).integers(-most.max(), most.max() + 1, (*ties.shape[:2], 1000))
    acc = np.clip(np.concatenate([near, some], -1), -most[:, None, None], most[:, None, None]).astype(np.int32)[None]
    return [acc if t is w else codes[:, None] for t in s.terms]

@pytest.mark.parametrize('bits,most', [('2', 'float32'), ('4', 'float32'), slow('8', 'float64')])
def test_sums_round_like_float64(bits, most):
    "Whatever precision a sum took: on every input it gives the integers of float64."
    net = integer_network(network('resnet20', bits), (1, 28, 28))
    sums = [s for s in net.steps if isinstance(s, IntSum) and len(s.terms) == 2]
    assert len(sums) == 9 and [s.kind.__name__ for s in sums].count(most) >= 8  # the last one ends on 8 bits
    for s in sums:
        accs = all_inputs(s)
        factors = [np.atleast_1d(t.scale*float(t.grid.scale) if isinstance(t, IntWeights) else t.scale)/s.grid.scale for t in s.terms]
        y = sum(np.float64(acc)*(f.reshape(1, -1, 1, 1) if len(f) > 1 else f) for f, acc in zip(factors, accs))
        for new, old in zip(s.factors, factors): assert np.abs(new/old - 1).max() <= 2.**-22
        offset = sum(t.bias for t in s.terms if isinstance(t, IntWeights))/s.grid.scale
        want = np.clip(np.rint(y + offset.reshape(1, -1, 1, 1)), 0, s.grid.n)
        assert np.array_equal(s.rescale(*accs), want), s.name
        assert np.abs(s.offset - offset).max() <= 32*np.spacing(np.float32(max(1, np.abs(offset).max())))

def test_layers_of_a_residual_network_are_exact():
    net, n = integer_network(network('resnet20', '4'), (1, 28, 28)), 0
    for s in net.steps:
        if not isinstance(s, IntLayer) or not s.grid: continue
        w, n = s.weights, n + 1
        most = np.abs(w.codes.reshape(len(w.codes), -1).astype(int)).sum(1).max()*w.grid.n
        acc = np.broadcast_to(np.arange(-most, most + 1, dtype=np.int32)[:, None], (2*most + 1, len(w.codes)))
        assert np.array_equal(s.rescale(acc), np.clip(np.rint((acc*(w.scale*w.grid.scale) + w.bias)/s.grid.scale), 0, s.grid.n)), s.name
    assert n >= 4

class Names(nn.Module):
    "Its modules are called like the file's tensors, one is used twice, and it flattens in forward."
    def __init__(self):
        super().__init__()
        self.image, self.conv, self.logits, self.flatten, self.pool = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)
        self.t1, self.c0 = nn.Linear(100, 10), nn.Dropout()
    def forward(self, x):
        x = self.pool(self.logits(self.image(x)))
        return self.t1(self.c0(self.pool(self.flatten(self.conv(x)))).flatten(1))

def test_names_that_the_file_has_too(tmp_path):
    torch.manual_seed(0)
    m = calibrate(convert(Names(), bit_policy('4'), digits(8), input_range=RANGE), digits(64))
    net, x = integer_network(m, (1, 28, 28)), digits(30)
    assert len({s.name for s in net.steps}) == len(net.steps) and np.array_equal(run(to_onnx(net, tmp_path/'m.onnx'), x), net(x))
    with torch.no_grad(): assert (net(x).argmax(1) == m.eval()(x).argmax(1).numpy()).mean() > .9

def test_flattening_what_is_flat_already(tmp_path):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 16, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16*36, 20), nn.ReLU(), nn.Flatten(), nn.Flatten(), nn.Linear(20, 10))
    m = calibrate(convert(m, bit_policy('4'), digits(8), input_range=RANGE), digits(64))
    net, x = integer_network(m, (1, 28, 28)), digits(30)
    assert np.array_equal(run(to_onnx(net, tmp_path/'m.onnx'), x), net(x))

def test_a_residual_of_flattened_features(tmp_path):
    "Flattened values that are read by an addition keep their order."
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.flat, self.fc, self.act, self.head = nn.Conv2d(1, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 196), nn.ReLU(), nn.Linear(196, 10)
        def forward(self, x):
            x = self.flat(self.relu(self.conv(x)))
            return self.head(self.act(self.fc(x) + x))
    torch.manual_seed(0)
    m = calibrate(convert(Add(), bit_policy('4'), digits(8), input_range=RANGE), digits(64))
    net, x = integer_network(m, (1, 28, 28)), digits(30)
    assert np.array_equal(run(to_onnx(net, tmp_path/'m.onnx'), x), net(x))
    with torch.no_grad(): assert np.abs(net(x) - m.eval()(x).numpy()).max() < .1*net(x).std()

def test_first_difference_of_one_image():
    m, x = network('lenet5', '4'), digits(30)
    net = integer_network(m, (1, 28, 28))
    step = next(s for s in net.steps if s.name == '1')
    step.bias = step.bias + np.rint(.5*step.grid.scale/(step.weights.grid.scale*step.w_scale)).astype(np.int32)
    whole, each = first_difference(m, net, x), [first_difference(m, net, x, i) for i in range(30)]
    assert sum(o['differ'] for o in each if o and o['layer'] == '1') == whole['differ'] and all(o['of'] == whole['of']/30 for o in each if o and o['layer'] == '1')
    for bad in (30, -1, 1.5):
        with pytest.raises(BadInput, match='image'): first_difference(m, net, x, bad)

def test_first_difference_finds_a_changed_layer():
    m, x = network('lenet5', '4'), digits(30)
    net = integer_network(m, (1, 28, 28))
    step = next(s for s in net.steps if s.name == '1')
    step.bias = step.bias + np.rint(.5*step.grid.scale/(step.weights.grid.scale*step.w_scale)).astype(np.int32)
    d = first_difference(m, net, x)
    assert d['layer'] == '1' and d['tie'] > .4 and 0 < d['differ'] < d['of']

# --- packed weights ---

@pytest.mark.parametrize('bits', [1, 2, 3, 4, 5, 6, 7, 8])
def test_packing(bits):
    rng = np.random.default_rng(bits)
    for shape in ((1,), (7,), (3, 5, 3, 3), (16, 8), (0,)):
        codes = rng.integers(0, 2**bits, shape)
        raw = pack_codes(codes, bits)
        assert raw.dtype == np.uint8 and raw.size == -(-codes.size*bits//8)
        assert np.array_equal(unpack_codes(raw, bits, shape), codes)
    for bad in ([2**bits], [-1]):
        with pytest.raises(BadInput, match='bits hold 0 to'): pack_codes(bad, bits)
    with pytest.raises(BadInput, match="don't hold 17 codes"): unpack_codes(pack_codes(np.zeros(8, int), bits), bits, (17,))

@pytest.mark.parametrize('bits,quantizer,per_channel', thinned((2, 3, 4, 5, 8), QUANTIZERS, (False, True)))
def test_codes_of_baked_weights(bits, quantizer, per_channel):
    for seed in range(3):
        torch.manual_seed(seed)
        m = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6*4, 5))
        convert(m, deploy_policy(bits), torch.randn(4, 3, 4, 4), weight_quantizer=quantizer, per_channel=per_channel)
        m[0].w_bits = bits
        if seed == 2: m[0].weight.data[1] = 0.  # a dead channel
        for a, b in zip(quant_layers(m).values(), quant_layers(bake(m)).values()):
            codes, scale = layer_codes(b)
            shape = (-1, *[1]*(codes.ndim - 1))
            assert codes.dtype == np.int8 and np.array_equal(codes*scale.reshape(shape), a.quant_weight().detach().numpy())
            assert deploy._index(codes, deploy._levels(b)).min() >= 0 and deploy._index(codes, deploy._levels(b)).max() < 2**b.w_bits
            if not per_channel and seed < 2: assert np.array_equal(codes, layer_codes(a)[0])

CASES = [('small_cnn', '4', {}), ('small_cnn', '2', {}), ('lenet5', '4/2', dict(weight_quantizer='sawb_zero')), ('lenet5', '3', dict(per_channel=True)),
         ('resnet20', '4', {}), ('resnet20', '2', dict(weight_quantizer='dorefa', per_channel=True)), ('resnet18', '4', {})]

@pytest.mark.parametrize('arch,bits,kw', CASES, ids=[f'{a}-{b}'.replace('/', '_') for a, b, _ in CASES])
def test_exported_folder_there_and_back(tmp_path, arch, bits, kw):
    m = bake(network(arch, bits, **kw))
    folder = export_model(m, tmp_path/'m', extra=dict(accuracy=.5), **FACTS)
    assert sorted(o.name for o in folder.iterdir()) == ['README.md', 'config.json', 'model.onnx', 'model.safetensors']  # the large QONNX file is asked for
    got, c = load_model(folder)
    x = digits(8)
    with torch.no_grad(): assert torch.equal(got(x), m.eval()(x))
    assert c['baked'] and c['weights']['kind'] == 'packed' and set(c['files']) == {'README.md', 'model.onnx', 'model.safetensors'}
    assert np.array_equal(run(folder/'model.onnx', x), integer_network(got, (1, 28, 28))(x))
    assert '50.00 %' in (folder/'README.md').read_text(encoding='utf-8')

@pytest.mark.parametrize('bits,bound', [('4', 7.7), ('2', 15)])
def test_files_are_small(tmp_path, bits, bound):
    size = float_onnx(get_model('small_cnn'), tmp_path/'f.onnx', (1, 28, 28)).stat().st_size
    folder = export_model(bake(network('small_cnn', bits)), tmp_path/'m', **FACTS)
    for o in ('model.onnx', 'model.safetensors'): assert (folder/o).stat().st_size*bound <= size, o

@pytest.mark.parametrize('arch', ['small_cnn', 'lenet5', 'resnet20', 'resnet18'])
def test_float_file_is_the_float_network(tmp_path, arch):
    torch.manual_seed(0)
    m = get_model(arch, 10, 1, 28)
    with torch.no_grad(): m.train()(digits(32))
    path, x = float_onnx(m.eval(), tmp_path/'f.onnx', (1, 28, 28)), digits(16)
    with torch.no_grad(): assert np.abs(run(path, x) - m(x).numpy()).max() < 1e-4

# --- what is refused ---

@pytest.fixture(scope='module')
def shipped(tmp_path_factory): return export_model(bake(network('lenet5', '4')), tmp_path_factory.mktemp('shipped')/'m', to=deploy.TARGETS, **FACTS)

@pytest.mark.parametrize('name', ['model.onnx', 'model.qonnx.onnx', 'model.safetensors', 'README.md'])
def test_a_missing_or_altered_file_is_named(shipped, tmp_path, name):
    for how, message in ((lambda p: p.unlink(), f'{name} is missing'), (lambda p: p.write_bytes(p.read_bytes()[:-1]), f'{name} .* truncated'),
                         (lambda p: p.write_bytes(p.read_bytes()[:-1] + b'!'), f'{name} .* altered')):
        shutil.rmtree(tmp_path/'m', ignore_errors=True)
        shutil.copytree(shipped, tmp_path/'m')
        how(tmp_path/'m'/name)
        with pytest.raises(BadInput, match=message): load_model(tmp_path/'m')

def test_packed_tensors_that_do_not_fit(shipped, tmp_path):
    from safetensors.torch import load_file, save
    good = load_file(shipped/'model.safetensors')
    for change, message in ((lambda t: t.pop('3.codes'), "lacks the codes or the scale of layer '3'"), (lambda t: t.update({'3.codes': t['3.codes'][:-1].clone()}), "don't hold 2400 codes of 4 bits"),
                            (lambda t: t.pop('3.bias'), "doesn't fit the network")):
        tensors = dict(good); change(tensors); raw = save(tensors)
        c = json.loads((shipped/'config.json').read_text(encoding='utf-8'))
        with pytest.raises(BadInput, match=message): deploy._rebuild(c, raw)

class Unusual(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.act, self.what, self.fc = nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), what, nn.Linear(4*169, 10)
    def forward(self, x): return self.fc(self.what(self.act(self.conv(x))).flatten(1))

REFUSED = {'AvgPool2d': lambda: nn.AvgPool2d(1), 'Sigmoid': lambda: nn.Sigmoid(), 'Upsample': lambda: nn.Upsample(scale_factor=1)}

@pytest.mark.parametrize('name', REFUSED)
def test_a_layer_without_a_rule_is_named(tmp_path, name):
    m = convert(Unusual(nn.Identity()), bit_policy('4'), digits(4), input_range=RANGE)
    m.what = REFUSED[name]()
    with pytest.raises(BadInput, match=f'what \\({name}\\) is no layer that the integer network has a rule for'): export_model(bake(m), tmp_path/'m', **FACTS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match=f'what \\({name}\\) is no layer that float_onnx has a rule for'): float_onnx(Unusual(REFUSED[name]()), tmp_path/'f.onnx', (1, 28, 28))

def test_grouped_convolutions_are_refused():
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4*576, 10))
    convert(m, bit_policy('4'), digits(4), input_range=RANGE)
    with pytest.raises(BadInput, match='2 \\(QConv2d\\) has groups'): integer_network(m, (1, 28, 28))

def test_float_and_partly_float_networks_are_refused(tmp_path):
    with pytest.raises(BadInput, match='float network, it has no low-bit weights'): export_model(get_model('lenet5'), tmp_path/'m', **FACTS)
    with pytest.raises(BadInput, match='float network, it has no integers'): integer_network(get_model('lenet5'), (1, 28, 28))
    m = network('lenet5', '4', overrides={'7': 32})
    with pytest.raises(BadInput, match='is in float; the integer network needs every layer quantized'): integer_network(m, (1, 28, 28))
    assert not list(tmp_path.iterdir())

def test_wrong_images_shapes_and_opsets_are_refused(tmp_path):
    net = integer_network(network('lenet5'), (1, 28, 28))
    with pytest.raises(BadInput, match=r'this network takes \(1, 28, 28\)'): net(torch.zeros(1, 3, 28, 28))
    with pytest.raises(BadInput, match="can't take an image of shape"): integer_network(network('lenet5'), (3, 28, 28))
    for bad in (20, 26, '21'):
        with pytest.raises(BadInput, match='opset is'): to_onnx(net, tmp_path/'m.onnx', opset=bad)
    with pytest.raises(BadInput, match='to_onnx writes an integer network'): to_onnx(network('lenet5'), tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())

def test_altered_baked_weights_are_refused(tmp_path):
    m = bake(network('lenet5'))
    m[3].weight.data[0, 0, 0, 0] *= 1.01
    with pytest.raises(BadInput, match='3 \\(QConv2d\\) are on no grid of 4 bits'): export_model(m, tmp_path/'m', **FACTS)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('opset', [21, 22, 23, 24, 25])
def test_opsets(tmp_path, opset):
    if opset > 23 and tuple(map(int, onnxruntime.__version__.split('.')[:2])) < (1, 25): pytest.skip('needs a newer onnxruntime, which needs Python 3.11')
    net, x = integer_network(network('lenet5'), (1, 28, 28)), digits(5)
    path = to_onnx(net, tmp_path/'m.onnx', opset=opset, meta=dict(note='hello'))
    m = onnx.load(path)
    assert m.opset_import[0].version == opset and m.metadata_props[0].value == 'hello' and m.ir_version >= 10 and (opset > 21 or m.ir_version == 10)
    assert np.array_equal(run(path, x), net(x))


# --- the card, the choice of files, the learner ---

CURVE = dict(frac=[0., .1, .5], accuracy=[.9, .5, .2], auc=.4)

def test_the_card_says_what_is_known(tmp_path):
    extra = dict(accuracy=.9876, n_test=1234, data={'SHA-256 of x_train': 'abc'}, masking=dict(gradient=CURVE, random=CURVE),
        spec=dict(dataset='mnist', sample=True, epochs=8, guided=True, seed=3))
    m = bake(network('lenet5', '4/2'))
    folder = export_model(m, tmp_path/'m', opset=22, extra=extra, **FACTS)
    card, config = (folder/'README.md').read_text(encoding='utf-8'), json.loads((folder/'config.json').read_text(encoding='utf-8'))
    for words in ('98.76 % of 1,234 test images', '`mnist` (the embedded sample) for 8 epochs, with saliency guidance; seed 3', 'SHA-256 of x_train`: abc',
                  '](masking_curve.png)', 'opset 22', '## Limits', f"{(folder/'model.onnx').stat().st_size:,} bytes"): assert words in card, words
    assert (folder/'masking_curve.png').read_bytes()[:4] == b'\x89PNG' and 'masking_curve.png' in config['files']
    from qisal.cost import count_cost
    cost = count_cost(m, digits(1))
    assert f"{cost['bops']:,} bit operations" in card and f"{cost['macs']:,} multiply" in card
    plain = (export_model(m, tmp_path/'plain', **FACTS)/'README.md').read_text(encoding='utf-8')
    assert plain.count('Not said at export.') == 2 and 'masking_curve' not in plain
    for k, v in quant_layers(m).items(): assert f'| `{k}` | {v.w_bits} | {v.a_bits} |' in plain

def test_a_masking_curve_that_is_none_is_refused(tmp_path):
    for bad in (dict(gradient=[1, 2]), dict(gradient=dict(frac=[0])), dict(gradient=dict(frac=['a'], accuracy=['b']))):
        with pytest.raises(BadInput, match=r"extra\['masking'\]\['gradient'\] is no masking curve"): export_model(bake(network('lenet5')), tmp_path/'m', extra=dict(masking=bad), **FACTS)
    assert not list(tmp_path.iterdir())

FILES = dict(packed='model.safetensors', onnx='model.onnx', qonnx='model.qonnx.onnx')

@pytest.mark.parametrize('to', ['packed', 'onnx', 'qonnx', 'onnx, packed', ('qonnx', 'onnx')], ids=str)
def test_what_is_written_can_be_chosen(tmp_path, to):
    folder = export_model(bake(network('lenet5')), tmp_path/'m', to=to, **FACTS)
    asked = {FILES[o.strip()] for o in (to.split(',') if isinstance(to, str) else to)}
    assert {o.name for o in folder.iterdir()} == asked | {'config.json', 'README.md'}
    card = (folder/'README.md').read_text(encoding='utf-8')
    for o in FILES.values(): assert (o in card) == (o in asked)
    if 'model.safetensors' in asked: load_model(folder)
    else:
        with pytest.raises(BadInput, match='holds no weights for torch'): load_model(folder)

def test_unknown_files_and_opsets_are_refused_before_any_work(tmp_path):
    with pytest.raises(BadInput, match="to 'pickle' is unknown"): export_model(get_model('lenet5'), tmp_path/'m', to='onnx,pickle', **FACTS)
    with pytest.raises(BadInput, match='to is empty'): export_model(get_model('lenet5'), tmp_path/'m', to=(), **FACTS)
    with pytest.raises(BadInput, match='opset is 26'): export_model(get_model('lenet5'), tmp_path/'m', opset=26, **FACTS)

def test_a_learner_is_exported_as_it_is_now(tmp_path):
    "It bakes by itself, also after more training; what it holds stays latent and trains on."
    from fastai.learner import Learner
    from qisal.callback.pact import PACTCallback
    from qisal.data import get_dls
    learn, same = Learner(get_dls('mnist', sample=True, n_train=64, batch_size=32), get_model('lenet5'), loss_func=nn.CrossEntropyLoss(), cbs=PACTCallback()), []
    with learn.no_bar(), learn.no_logging():
        for _ in range(2):
            learn.fit(1)
            folder = export_model(learn, tmp_path/'m')
            assert not any(o.baked for o in quant_layers(learn.model).values())
            with torch.no_grad(): got, want = load_model(folder)[0](digits(4)), learn.model.eval()(digits(4))
            assert torch.equal(got, want)
            same.append(got)
    assert not torch.equal(*same) and json.loads((folder/'config.json').read_text(encoding='utf-8'))['classes'] == list('0123456789')
    bare = export_model(learn.model, tmp_path/'bare', **FACTS)
    for o in ('model.onnx', 'model.safetensors'): assert (bare/o).read_bytes() == (folder/o).read_bytes()

# --- onnxruntime ---

def test_an_export_that_onnxruntime_answers_differently_is_refused(tmp_path, monkeypatch):
    class Wrong:
        def run(self, *args): return [np.ones((8, 10), np.float32)]
    m = bake(network('lenet5'))
    with monkeypatch.context() as mp:
        mp.setattr(deploy, 'onnx_session', lambda *a, **k: Wrong())
        with pytest.raises(BadInput, match=r'other logits for model.onnx than integer arithmetic \(for 8 of 8 images, by up to'): export_model(m, tmp_path/'m', **FACTS)
    with monkeypatch.context() as mp:
        mp.setattr(deploy, 'onnx_graph_ops', lambda raw: {'Conv': 2})
        with pytest.raises(BadInput, match=r'would run model.onnx in float \(Conv\)'): export_model(m, tmp_path/'m', **FACTS)
    assert not list(tmp_path.iterdir())

def test_an_onnxruntime_too_old_for_the_file(tmp_path):
    m = onnx.load(to_onnx(integer_network(network('lenet5'), (1, 28, 28)), tmp_path/'m.onnx'))
    good = m.SerializeToString()
    m.ir_version = 99
    with pytest.raises(BadInput, match=rf'onnxruntime {onnxruntime.__version__} is too old for the ONNX file \(Unsupported model IR version: 99'): deploy.onnx_session(m.SerializeToString())
    m.ir_version, m.opset_import[0].version = 10, 99
    (tmp_path/'new.onnx').write_bytes(m.SerializeToString())
    with pytest.raises(BadInput, match='too old for .*new.onnx'): deploy.onnx_session(tmp_path/'new.onnx')
    for bad in (good[:500], b'', b'no ONNX'):
        with pytest.raises(BadInput, match="onnxruntime can't open the ONNX file"): deploy.onnx_session(bad)
    with pytest.raises(BadInput, match='none.onnx is not a file'): deploy.onnx_session(tmp_path/'none.onnx')
    with pytest.raises(BadInput, match='threads is 0'): deploy.onnx_session(good, threads=0)

# --- what is compared before a file is kept ---

def small(*layers, bits='4', seed=0, xb=None, **kw):
    "A sequential network, converted and calibrated."
    torch.manual_seed(seed)
    xb = digits(64) if xb is None else xb
    return calibrate(convert(nn.Sequential(*layers), bit_policy(bits), xb[:8], input_range=RANGE, **kw), xb)

def convs(bits='4', **kw):
    return small(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10), bits=bits, **kw)

def apart(m, x):
    "How far the integers are from torch beyond what is allowed, the logits as a share of the largest."
    m = bake(m)
    net = integer_network(m, (tuple(x.shape[1:])))
    allowed, (found, answers) = deploy._own_rounding(net), deploy._apart(m, net, x)
    assert np.array_equal(answers, net(x))
    over = {k: (d - deploy._per_channel(allowed.get(k, np.zeros(1)), d.ndim)).max() for k, d in found.items()}
    return net, over.pop('logits')/np.abs(net(x)).max(), over

@pytest.mark.parametrize('arch,bits,quantizer,per_channel', [('small_cnn', '2', 'sawb', False), ('lenet5', '8', 'sawb_zero', True), ('resnet20', '8', 'sawb', False), ('resnet20', 'w2a4', 'dorefa', True)])
def test_every_layer_is_held_to_torch_and_is_far_from_the_bound(arch, bits, quantizer, per_channel):
    net, logits, over = apart(network(arch, bits, weight_quantizer=quantizer, per_channel=per_channel), digits(4))
    assert set(over) == {s.name for s in net.steps if isinstance(s, (deploy.IntQuantize, IntLayer, IntSum))} - {'logits'}  # none is left out
    assert max(over.values()) < 1e-4 and logits < 1e-6  # the bounds are 2e-3 and 1e-5

HOOKS = {'a pre-hook of a layer': lambda m: m[2].register_forward_pre_hook(lambda m, x: (1.2*x[0],)), 'a hook of a layer': lambda m: m[0].register_forward_hook(lambda m, x, out: out + .1),
         'a hook of a PACT': lambda m: m[1].register_forward_hook(lambda m, x, out: 1.5*out), 'a hook of the logits': lambda m: m[6].register_forward_hook(lambda m, x, out: out.flip(1))}

@pytest.mark.parametrize('name', HOOKS)
def test_a_hook_that_changes_values_is_found(tmp_path, name):
    m = bake(convs())
    export_model(m, tmp_path/'good', **FACTS)
    HOOKS[name](m)
    with pytest.raises(BadInput, match=r'The integer network is not the one in torch: at \w+, [\d,]+ of [\d,]+ (integers|logits) for 8 images are off, by up to [\d.]+'): export_model(m, tmp_path/'m', **FACTS)
    assert [o.name for o in tmp_path.iterdir()] == ['good']

@pytest.mark.parametrize('what', ['a code', 'a bias', 'an order'])
def test_wrong_integers_are_found(tmp_path, monkeypatch, what):
    m, right = bake(convs()), integer_network
    def wrong(*args):
        net = right(*args)
        s = next(o for o in net.steps if o.name == '4')
        if what == 'a code': s.weights.codes[1, 1] += 4
        elif what == 'a bias': s.bias[2] += round(1.1*s.grid.scale/(s.weights.grid.scale*s.w_scale[2]))
        else: s.weights.codes[:] = s.weights.codes[::-1].copy()
        return net
    monkeypatch.setattr(deploy, 'integer_network', wrong)
    with pytest.raises(BadInput, match='not the one in torch: at 4, '): export_model(m, tmp_path/'m', **FACTS)
    assert not list(tmp_path.iterdir())

def test_packed_codes_that_do_not_give_the_weights_back(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, '_index', lambda codes, levels: np.abs(codes).astype(np.int16))
    with pytest.raises(BadInput, match='0.weight doesn.t come back from its packed codes'): export_model(bake(convs()), tmp_path/'m', to='packed', **FACTS)

# --- channels and layers without weights ---

@pytest.mark.parametrize('last', [False, True])
def test_channels_without_weights_give_their_bias(tmp_path, last):
    "Of a convolution: relu of the bias; of the last layer: the bias itself. Baked or not the file is the same, and exact."
    m = convs(weight_quantizer='sawb_zero', per_channel=True)
    with torch.no_grad():
        if last: m[6].weight[:3], m[6].bias[:3] = 0, torch.tensor([.123, -4.5, 0])
        else:
            m[2].weight[:3], m[3].running_mean[:3] = 0, 0
            m[2].bias[:3], m[3].weight[:3], m[3].bias[:3] = 0, 1, torch.tensor([.31, -1., 50.])*m[4].alpha
        want = m(digits(30)).numpy()
    files = []
    for o in (m, bake(m)):
        net = integer_network(o, (1, 28, 28))
        if last: assert np.allclose(net(digits(30))[:, :3], [.123, -4.5, 0], rtol=1e-6)
        else: assert (net.codes(digits(30))['4'][:, :3] == np.array([round(.31*255), 0, 255])[:, None, None]).all()
        assert (net(digits(30)).argmax(1) == want.argmax(1)).all() and np.abs(net(digits(30)) - want).max() < 1e-2*want.std()
        files.append(to_onnx(net, tmp_path/'m.onnx').read_bytes())
        assert np.array_equal(run(tmp_path/'m.onnx', digits(30)), net(digits(30)))
    assert files[0] == files[1] or last  # of the last layer the scales of all channels stand in the file
    export_model(m, tmp_path/'m', **FACTS)

def test_a_layer_without_weights(tmp_path):
    m = convs(weight_quantizer='sawb_zero')
    with torch.no_grad(): m[2].weight.zero_(); m[3].running_mean.zero_(); want = m(digits(20)).numpy()
    net = integer_network(bake(m), (1, 28, 28))
    assert np.abs(net(digits(20)) - want).max() < 1e-3*np.abs(want).max() and len(np.unique(net(digits(20)), axis=0)) == 1
    export_model(m, tmp_path/'m', **FACTS)

def test_a_zero_on_a_grid_that_has_none_is_refused(tmp_path):
    m = bake(convs(weight_quantizer='sawb'))
    with torch.no_grad(): m[2].weight[0, 0, 0, 0] = 0
    with pytest.raises(BadInput, match=r'The weights of 2 \(QConv2d\) are on no grid of 4 bits'): export_model(m, tmp_path/'m', **FACTS)

# --- numbers and facts that are none ---

def put(path, value):
    def change(m):
        with torch.no_grad(): m.get_parameter(path).flatten()[0].fill_(value) if path in dict(m.named_parameters()) else m.get_buffer(path).flatten()[0].fill_(value)
    return change

NUMBERS = {o: (put(o[0], o[1]), f"{o[0].split('.')[0]} \\(\\w+\\) has {o[2]}") for o in [
    ('2.weight', np.nan, 'NaN or infinity in its weight'), ('0.bias', np.inf, 'NaN or infinity in its bias'), ('3.running_mean', -np.inf, 'NaN or infinity in its running_mean'),
    ('3.running_var', np.nan, r'NaN or infinity in its running_var \(1 of 4 numbers\)'), ('3.running_var', -1., 'a variance of -1 in its running_var'), ('3.weight', np.nan, 'NaN or infinity in its weight'),
    ('1.alpha', np.nan, 'NaN or infinity in its alpha'), ('1.alpha', 0., 'the clipping level 0 in its alpha')]}

@pytest.mark.parametrize('name', NUMBERS, ids=str)
def test_numbers_that_are_none_are_refused_by_layer(tmp_path, name):
    change, message = NUMBERS[name]
    m = convs()
    change(m)
    for f in (lambda: export_model(m, tmp_path/'m', **FACTS), lambda: deploy.save_model(m, tmp_path/'m', **FACTS), lambda: integer_network(m, (1, 28, 28)), lambda: deploy.to_qonnx(m, tmp_path/'q.onnx', (1, 28, 28))):
        with pytest.raises(BadInput, match=message) as e: f()
        assert '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())

def test_float_networks_with_numbers_that_are_none(tmp_path):
    m = get_model('resnet20', 10, 1, 28)
    m[1].running_var[3] = np.nan
    for f in (lambda: float_onnx(m, tmp_path/'f.onnx', (1, 28, 28)), lambda: deploy.save_model(m, tmp_path/'m', **FACTS)):
        with pytest.raises(BadInput, match=r'1 \(BatchNorm2d\) has NaN or infinity in its running_var'): f()
    assert not list(tmp_path.iterdir())

WRONG = {'two names for ten logits': (dict(classes=['no', 'yes']), r'gives \(10,\) for an image, and there are 2 classes'), 'one name': (dict(classes=['yes']), 'classes has 1 name'),
         'a name twice': (dict(classes=['a']*2 + [str(i) for i in range(8)]), "names 'a' more than once"), 'a text': (dict(classes='0123456789'), 'classes is the text'),
         'a deviation of 0': (dict(stats=([.1], [0.])), 'deviation in stats.* is 0.0'), 'below 0': (dict(stats=([.1], [-1.])), 'is -1.0; it must be a number above 0'), 'NaN': (dict(stats=([.1], [np.nan])), 'deviation in stats.* is nan'),
         'an infinite mean': (dict(stats=([np.inf], [1.])), 'mean in stats is inf'), 'another number of channels': (dict(n_in=3, stats=([.1]*3, [.3]*3)), "can't take images of 3 x 28 x 28"),
         'another size': (dict(size=20), "can't take images of 1 x 20 x 20"), 'half a pixel': (dict(size=28.5), 'size is 28.5'), 'three sides': (dict(size=(28, 28, 1)), r'size is \(28, 28, 1\)'), 'no channel': (dict(n_in=0), 'n_in is 0'),
         'another background': (dict(background='green'), "background 'green' is unknown")}

@pytest.mark.parametrize('name', WRONG)
def test_facts_that_do_not_fit_are_refused(tmp_path, name):
    kw, message = WRONG[name]
    for f in (export_model, deploy.save_model):
        with pytest.raises(BadInput, match=message) as e: f(convs(), tmp_path/'m', **{**FACTS, **kw})
        assert '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())

def test_a_network_of_one_logit_is_refused(tmp_path):
    m = small(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4*169, 1))
    for classes in (['yes'], ['no', 'yes']):
        with pytest.raises(BadInput, match='logit'): export_model(m, tmp_path/'m', **{**FACTS, 'classes': classes})
    assert not list(tmp_path.iterdir())

# --- other networks and images ---

FIRST = {'flatten': (nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10)), 'flatten and dropout': (nn.Flatten(), nn.Dropout(.1), nn.Linear(784, 10)),
         'max pooling': (nn.MaxPool2d(3, 2, 1), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)), 'max pooling and flatten': (nn.MaxPool2d(4), nn.Flatten(), nn.Linear(49, 20), nn.ReLU(), nn.Linear(20, 10))}

@pytest.mark.parametrize('name', FIRST)
def test_what_moves_the_image_before_the_first_layer(tmp_path, name):
    import copy
    m, x = small(*copy.deepcopy(FIRST[name])), digits(30)
    net = integer_network(m, (1, 28, 28))
    with torch.no_grad(): assert np.corrcoef(net(x).ravel(), m(x).numpy().ravel())[0, 1] > .999
    folder = export_model(m, tmp_path/'m', to=deploy.TARGETS, **FACTS)
    assert np.array_equal(run(folder/'model.onnx', x), net(x))
    fresh = nn.Sequential(*copy.deepcopy(FIRST[name]))
    with torch.no_grad(): assert torch.equal(load_model(folder, model=fresh)[0](x), bake(m)(x))

def test_colour_images_are_flattened_in_their_order(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 6, 8)
    m = calibrate(convert(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 4)), bit_policy('4'), x), x)
    net = integer_network(m, (3, 6, 8))
    with torch.no_grad(): assert np.corrcoef(net(x).ravel(), m(x).numpy().ravel())[0, 1] > .999
    assert np.array_equal(run(to_onnx(net, tmp_path/'m.onnx'), x), net(x))

def test_computing_with_the_image_is_refused(tmp_path):
    m = small(nn.Identity(), nn.Flatten(), nn.Linear(1, 10), xb=digits(64)[..., :1, :1])
    m[0] = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(BadInput, match=r'0 \(AdaptiveAvgPool2d\) computes with the image before a layer has quantized it'): integer_network(m, (1, 28, 28))

def test_images_that_are_not_square(tmp_path):
    x = digits(40)[:, :, 4:24]
    m = small(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4*5*7, 10), xb=x)
    facts = {**FACTS, 'size': (20, 28)}
    folder = export_model(m, tmp_path/'m', **facts)
    c = json.loads((folder/'config.json').read_text(encoding='utf-8'))
    assert c['size'] == [20, 28] and c['version'] == 2 and c['arch'] is None and '20 x 28 pixels' in (folder/'README.md').read_text(encoding='utf-8')
    assert np.array_equal(run(folder/'model.onnx', x), integer_network(m, (1, 20, 28))(x))
    with pytest.raises(BadInput, match="can't take images of 1 x 28 x 24"): export_model(m, tmp_path/'n', **{**FACTS, 'size': (28, 24)})
    square = json.loads((export_model(bake(network('lenet5')), tmp_path/'s', **{**FACTS, 'size': (28, 28)})/'config.json').read_text(encoding='utf-8'))
    assert square['size'] == 28 and square['version'] == 1 and square['arch'] == 'lenet5'  # what older versions read, too
    saved = deploy.save_model(m, tmp_path/'saved', **facts)
    assert deploy.read_config(saved)['size'] == [20, 28]

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_another_type_are_exported_in_float32(tmp_path, dtype):
    m = convs('8').to(dtype)
    folder = export_model(m, tmp_path/'m', **FACTS)
    with torch.no_grad(): want = m.float()(digits(20)).numpy()
    assert np.abs(run(folder/'model.onnx', digits(20)) - want).max() < .05*want.std()

def test_layers_that_share_weights(tmp_path):
    "Each has its own codes in the file; batch norms fold into one without changing the other; loaded into a network that shares them, too."
    def net(tied):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*81, 10))
        if tied: m[5].weight = m[2].weight
        return m
    m = calibrate(convert(net(False), bit_policy('4'), digits(8), input_range=RANGE), digits(64))
    with torch.no_grad(): m[3].weight.copy_(torch.tensor([1., -2, .5, 3])); m[5].weight.copy_(m[2].weight)
    m = bake(m)
    m[5].weight = m[2].weight
    folder, x = export_model(m, tmp_path/'m', **FACTS), digits(20)
    assert np.array_equal(run(folder/'model.onnx', x), integer_network(m, (1, 28, 28))(x))
    for tied in (False, True):
        with torch.no_grad(): assert torch.equal(load_model(folder, model=net(tied))[0](x), m.eval()(x))
    m[5].weight = nn.Parameter(-m[2].weight.detach())
    folder = export_model(m, tmp_path/'other', **FACTS)
    with pytest.raises(BadInput, match='shares .*weight with another layer, for which model.safetensors holds other numbers'): load_model(folder, model=net(True))

def test_a_layer_that_is_used_twice_is_not_folded(tmp_path):
    class Twice(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv, self.a, self.b, self.both = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.BatchNorm2d(1), conv
            self.other, self.flat, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(784, 10)
        def forward(self, x): return self.fc(self.flat(self.b(self.conv(self.a(self.conv(x)))) if self.both else self.a(self.other(self.a(self.conv(x))))))
    for conv in (True, False):
        with pytest.raises(BadInput, match=r'(a|b) \(BatchNorm2d\) or the convolution before it is used more than once'): float_onnx(Twice(conv), tmp_path/'f.onnx', (1, 28, 28))

def test_every_node_has_a_name(tmp_path):
    for path in (to_onnx(integer_network(network('resnet20', '3'), (1, 28, 28)), tmp_path/'i.onnx'), float_onnx(get_model('resnet20', 10, 1, 28), tmp_path/'f.onnx', (1, 28, 28)), deploy.to_qonnx(network('resnet20'), tmp_path/'q.onnx', (1, 28, 28))):
        names = [o.name for o in onnx.load(path).graph.node]
        assert all(names) and len(set(names)) == len(names), path.name

# --- ordinary fastai loaders ---

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Forty digits as files, 20 pixels high and 28 wide, in a folder a class."
    from PIL import Image
    root, a = tmp_path_factory.mktemp('pictures'), sample_arrays('mnist')
    for k in (3, 7):
        (root/str(k)).mkdir()
        for i, o in enumerate(a.x_train[a.y_train == k][:20, 4:24, :, 0]): Image.fromarray(o).save(root/str(k)/f'{i}.png')
    return root

def own_learner(root, tfms, cls=None, n_in=1):
    from fastai.vision.all import ImageDataLoaders, Learner, PILImageBW
    from qisal.callback.pact import PACTCallback
    dls = ImageDataLoaders.from_folder(root, valid_pct=.2, seed=0, img_cls=cls or PILImageBW, batch_tfms=tfms, bs=8, num_workers=0)
    return Learner(dls, nn.Sequential(nn.Conv2d(n_in, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4*9*13, 2)), loss_func=nn.CrossEntropyLoss(), cbs=PACTCallback())

def test_a_learner_with_ordinary_loaders_brings_its_facts(tmp_path, pictures):
    from fastai.vision.all import Normalize, PILImage
    from qisal.serve import predict
    for tfms, cls, stats in ((Normalize.from_stats([.2], [.4]), None, ([.2], [.4])), (None, None, ([0.], [1.])), (Normalize.from_stats([.1, .2, .3], [.4, .5, .6]), PILImage, ([.1, .2, .3], [.4, .5, .6]))):
        learn = own_learner(pictures, tfms, cls, len(stats[0]))
        state = torch.get_rng_state()
        folder = export_model(learn, tmp_path/'m')
        assert torch.equal(torch.get_rng_state(), state)
        c = deploy.read_config(folder)
        assert (c['classes'], c['n_in'], c['size']) == (['3', '7'], len(stats[0]), [20, 28]) and np.allclose(c['stats'], stats)
        files = sorted(pictures.rglob('*.png'))
        xb = torch.cat([o[0].as_subclass(torch.Tensor) for o in learn.dls.test_dl(files, bs=40)])
        with torch.no_grad(): want = learn.model.eval()(xb).numpy()
        from PIL import Image
        got = predict(folder, [Image.open(o).convert('RGB' if cls else 'L') for o in files]).logits
        assert np.median(np.abs(got - want)) < 1e-4
    for kw, message in ((dict(size=28), r'size is 28, but the learner.s data have \(20, 28\)'), (dict(n_in=1), "n_in is 1, but the learner's data have 3"), (dict(stats=([0.]*3, [1.]*3)), 'stats is .* but the learner')):
        with pytest.raises(BadInput, match=message): export_model(learn, tmp_path/'n', **kw)
    assert not (tmp_path/'n').exists()
    export_model(learn, tmp_path/'n', size=(20, 28), n_in=3, stats=stats, classes=['three', 'seven'])  # names may be given

def test_several_labels_an_image_are_refused(tmp_path, pictures):
    from fastai.losses import BCEWithLogitsLossFlat
    learn = own_learner(pictures, None)
    for loss in (BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), nn.functional.binary_cross_entropy_with_logits):
        learn.loss_func = loss
        for f in (export_model, deploy.save_model):
            with pytest.raises(BadInput, match='for images with several labels or none'): f(learn, tmp_path/'m')
    assert not list(tmp_path.iterdir())

def test_loaders_that_do_not_say_how_pixels_are_scaled(tmp_path, pictures):
    from fastai.learner import Learner
    from fastai.vision.all import DataLoaders, load_learner
    from qisal.callback.pact import PACTCallback
    ds = [(digits(40)[i], i % 10) for i in range(40)]
    plain = [torch.utils.data.DataLoader(ds, 8, shuffle=i == 0) for i in range(2)]
    learn = Learner(DataLoaders(*plain), get_model('lenet5'), loss_func=nn.CrossEntropyLoss())
    learn.model = network('lenet5')
    with pytest.raises(BadInput, match="export_model doesn't know classes, stats; give them"): export_model(learn, tmp_path/'m')
    export_model(learn, tmp_path/'m', classes=FACTS['classes'], stats=FACTS['stats'])
    own = own_learner(pictures, None)
    own.dls = own.dls.new_empty()
    with pytest.raises(BadInput, match="export_model doesn't know n_in, size, stats"): export_model(own, tmp_path/'n')
    export_model(own, tmp_path/'n', n_in=1, size=(20, 28), stats=([0.], [1.]))
    own.dls = DataLoaders(*[torch.utils.data.DataLoader([(torch.zeros(5), 0)]*8, 4)]*2)
    with pytest.raises(BadInput, match='for classifiers of images, N x C x H x W'): export_model(own, tmp_path/'o')

def test_the_background_of_transparent_images_is_kept(tmp_path):
    assert deploy.read_config(export_model(convs(), tmp_path/'m', background='black', **FACTS))['background'] == 'black'
    assert 'background' not in deploy.read_config(export_model(convs(), tmp_path/'n', **FACTS))

def test_the_files_are_those_of_before(tmp_path):
    "The bytes of a file depend on the network alone: not on the images that were compared, nor on who baked."
    m = convs('4/2')
    a, b = export_model(m, tmp_path/'a', **FACTS), export_model(bake(m), tmp_path/'b', **FACTS)
    for o in ('model.onnx', 'model.safetensors', 'README.md'): assert (a/o).read_bytes() == (b/o).read_bytes()
