"The QONNX file: what it holds, what the executor of `qonnx` makes of it, and what its cost report says."
import functools
import numpy as np
import onnx
import pytest, torch
from onnx import numpy_helper
from torch import nn
import qisal.deploy as deploy
from qisal.core import BadInput
from qisal.cost import count_cost
from qisal.deploy import fold_batchnorm, layer_codes, onnx_session, to_qonnx
from qisal.models import get_model
from qisal.quant import InputQuant, PACT, bake, bit_policy, convert, pacts, quant_layers
from test_export import POLICIES, QUANTIZERS, RANGE, Unusual, calibrate, digits, names, network, pytestmark, slow, thinned  # noqa: F401 (a mark)

SHAPE, DOMAIN = (1, 28, 28), 'qonnx.custom_op.general'

@pytest.fixture
def executor(monkeypatch):
    "The executor of `qonnx`, with a file format that the installed onnxruntime can read."
    ex = pytest.importorskip('qonnx.core.onnx_exec')
    monkeypatch.setattr(ex, 'qonnx_make_model', functools.partial(ex.qonnx_make_model, ir_version=10))
    return ex

def opened(path):
    "The file as tools of `qonnx` take it."
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes
    return ModelWrapper(str(path)).transform(InferShapes())

def run(ex, path, x):
    "Every tensor by name."
    from qonnx.transformation.change_batchsize import ChangeBatchSize
    from qonnx.transformation.infer_shapes import InferShapes
    return ex.execute_onnx(opened(path).transform(ChangeBatchSize(len(x))).transform(InferShapes()), {'image': x.numpy()}, True)

def check_agreement(m, seen, x, tie=2e-4):
    """Each quantizer of the network in torch reads what the executor's quantizers before it gave, so that every layer and image is held to it:
    integers differ by one, and only where torch's value was a tie; the logits agree. Gives the number of such integers."""
    flips, hooks = [], []
    def listen(name):
        def hook(q, args, out):
            got = seen[f'{name}.quant']
            step, n = (q.scale, q.n) if isinstance(q, InputQuant) else (q.alpha.detach()/(2**q.bits - 1), 2**q.bits - 1)
            bad = out.numpy() != got
            before = (args[0]/step).numpy()[bad]
            assert (np.abs(before - np.floor(before) - .5) < tie*max(1, n/60)).all(), (name, np.abs(before - np.floor(before) - .5).max())
            assert (np.abs(out.numpy()[bad] - got[bad]) < 1.01*float(step)).all(), name
            flips.append(int(bad.sum()))
            return torch.from_numpy(got)
        return hook
    for name, q in m.named_modules():
        if isinstance(q, (PACT, InputQuant)): hooks.append(q.register_forward_hook(listen(name)))
    with torch.no_grad(): want = m.eval()(x).numpy()
    for h in hooks: h.remove()
    assert len(flips) == len(hooks) and sum(flips) < 1e-3*sum(v.size for k, v in seen.items() if k.endswith('.quant'))
    assert np.allclose(seen['logits'], want, rtol=1e-4, atol=1e-4*want.std()), np.abs(seen['logits'] - want).max()
    assert want.std() > 1e-3 and (seen['logits'].argmax(1) == want.argmax(1)).all()
    return sum(flips)

def check_cost(m, report):
    ours = count_cost(m, digits(1))
    assert report['total_macs'] == ours['macs'] and report['total_bops'] == ours['bops']
    layers = quant_layers(m).values()
    assert report['total_mem_w_elems'] == sum(o.weight.numel() for o in layers)
    assert report['total_mem_w_bits'] == sum(o.weight.numel()*o.w_bits for o in layers)
    for o in ours['layers']: assert f"op_mac_SCALEDINT<{o['a_bits']}>_SCALEDINT<{o['w_bits']}>" in report
    assert not any('FLOAT' in k for k in report if k.startswith(('op_mac', 'mem_w')))

def check(ex, path, m, x, cost=True):
    "Weights, logits and costs of one file; the number of ties that went the other way."
    from qonnx.util.inference_cost import inference_cost
    to_qonnx(m, path, SHAPE)
    seen = run(ex, path, x)
    for name, o in quant_layers(bake(m)).items():
        assert np.array_equal(seen[f'{name}.weight.quant'], o.weight.detach().numpy()), name
    if cost: check_cost(m, inference_cost(str(path), discount_sparsity=False)['total_cost'])
    return check_agreement(m, seen, x)

ALL = thinned(('lenet5',), POLICIES, QUANTIZERS, (False, True), (8,))
ALL += [('small_cnn', '4', 'sawb', False, 4), slow('small_cnn', '2', 'dorefa', True, 4), slow('small_cnn', '4/2', 'sawb_zero', False, 4), ('small_cnn', '8', 'sawb', True, 4)]
ALL += [slow('resnet20', '4/2', 'sawb', False, 2), ('resnet20', '2', 'sawb', True, 2), slow('resnet20', 'w4a2', 'sawb_zero', False, 2), slow('resnet20', '8', 'dorefa', True, 2)]

@pytest.mark.parametrize('arch,bits,quantizer,per_channel,n', ALL, ids=names(ALL))
def test_weights_logits_and_costs_agree(executor, tmp_path, arch, bits, quantizer, per_channel, n):
    m = network(arch, bits, weight_quantizer=quantizer, per_channel=per_channel)
    check(executor, tmp_path/'m.onnx', m, digits(n), cost=arch != 'resnet20' or bits == '4/2')  # counting a deep network takes the package long

@pytest.mark.parametrize('bits', [3, 5])
@pytest.mark.parametrize('quantizer', ['sawb', 'dorefa'])
def test_odd_widths_and_no_wider_ends(executor, tmp_path, bits, quantizer):
    from qisal.quant import BitPolicy
    m = convert(network('lenet5', '4'), BitPolicy((bits, bits), (bits, bits), None), digits(4), weight_quantizer=quantizer, input_range=RANGE)
    check(executor, tmp_path/'m.onnx', m, digits(4))

@pytest.mark.parametrize('kw', [{}, dict(per_channel=True)])
def test_training_baked_and_again_give_the_same_bytes(tmp_path, kw):
    m = network('lenet5', '4/2', **kw)
    m.train()
    state = {k: v.clone() for k, v in m.state_dict().items()}
    raw = [to_qonnx(o, tmp_path/'m.onnx', SHAPE, meta=dict(note='hello')).read_bytes() for o in (m, m, bake(m).eval())]
    assert raw[0] == raw[1] and m.training and all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert onnx.load_from_string(raw[0]).metadata_props[0].value == 'hello'
    # baked weights have lost their scale, which is found again up to a rounding; the weights are the same
    a, b = (weights_by_hand(onnx.load_from_string(o)) for o in (raw[0], raw[2]))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

def weights_by_hand(model):
    "What the `Quant` nodes of constants give, by the formula and without `qonnx`."
    c, res = {o.name: numpy_helper.to_array(o) for o in model.graph.initializer}, {}
    for n in model.graph.node:
        if n.op_type != 'Quant' or n.input[0] not in c: continue
        x, s, z, bits = (c[o] for o in n.input)
        a = {o.name: o.i for o in n.attribute}
        low, high = (-2**(int(bits) - 1) + a['narrow'], 2**(int(bits) - 1) - 1) if a['signed'] else (0, 2**int(bits) - 1 - a['narrow'])
        res[n.name] = (np.rint(np.clip(x/s + z, low, high)) - z)*s
    return res

NODES = [*thinned(('small_cnn',), ('2', '4', '8'), QUANTIZERS, (False, True)), ('resnet20', '4/2', 'sawb', False), slow('resnet18', 'w2a4', 'sawb', True)]

@pytest.mark.parametrize('arch,bits,quantizer,per_channel', NODES)
def test_the_nodes_say_what_the_layers_are(tmp_path, arch, bits, quantizer, per_channel):
    "Without `qonnx`: every quantizer is there once, with its numbers."
    m = network(arch, bits, weight_quantizer=quantizer, per_channel=per_channel)
    model = onnx.load(to_qonnx(m, tmp_path/'m.onnx', SHAPE))
    onnx.checker.check_model(model)
    c = {o.name: numpy_helper.to_array(o) for o in model.graph.initializer}
    found = {n.name: n for n in model.graph.node if n.op_type == 'Quant'}
    assert all(n.domain == DOMAIN for n in found.values())
    weights = weights_by_hand(model)
    layers = quant_layers(m)
    assert set(weights) == {f'{n}.weight' for n in layers}
    first = next(iter(layers))
    assert set(found) == set(weights) | set(pacts(m)) | {f'{first}.input_quant'}
    for name, o in layers.items():
        n = found[f'{name}.weight']
        s, z, b = (c[i] for i in n.input[1:])
        a = {i.name: i.i if i.type == onnx.AttributeProto.INT else i.s for i in n.attribute}
        odd = quantizer == 'sawb_zero' or o.w_bits == 8
        assert np.array_equal(weights[n.name], o.quant_weight().detach().numpy())
        assert b == o.w_bits and b.ndim == 0 and a == dict(signed=1, narrow=int(odd), rounding_mode=b'ROUND') and z == (0 if odd else -.5)
        assert s.shape == ((len(o.weight), *[1]*(o.weight.ndim - 1)) if per_channel else ())
    for name, o in pacts(m).items():
        n = found[name]
        s, z, b = (c[i] for i in n.input[1:])
        assert s == np.float32(o.alpha.item())/np.float32(2**o.bits - 1) and z == 0 and b == o.bits and {i.name: i.i for i in n.attribute}['signed'] == 0
        assert next(i for i in model.graph.node if n.input[0] in i.output).op_type == 'Relu'
    # the widths that qonnx can't infer are stated
    stated = {o.tensor_name: o.quant_parameter_tensor_names[0].value for o in model.graph.quantization_annotation}
    want = {f'{first}.input_quant': 8, **{f'{n}.weight': o.w_bits for n, o in layers.items() if c[found[f'{n}.weight'].input[2]] != 0}}
    assert stated == {f'{k}.width': f'SCALEDINT<{v}>' for k, v in want.items()}
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 28, 28]
    assert {o.domain: o.version for o in model.opset_import} == {'': 13, DOMAIN: 1}

def test_tools_of_qonnx_keep_the_meaning(executor, tmp_path):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.remove import RemoveIdentityOps
    from qonnx.util.cleanup import cleanup_model
    from qonnx.util.inference_cost import inference_cost
    m, x = network('small_cnn', '4'), digits(2)
    path = to_qonnx(m, tmp_path/'m.onnx', SHAPE)
    want = run(executor, path, x)['logits']
    clean = cleanup_model(ModelWrapper(str(path)), override_inpsize=2)
    assert {n.op_type for n in clean.graph.node} == {n.op_type for n in onnx.load(path).graph.node}
    name = clean.graph.input[0].name
    assert np.array_equal(executor.execute_onnx(clean, {name: x.numpy()})[clean.graph.output[0].name], want)
    cost = inference_cost(cleanup_model(ModelWrapper(str(path))), discount_sparsity=False)['total_cost']
    check_cost(m, cost)
    assert cost['unsupported'] == str({'Round'})  # has no weights and no products
    # without what states the widths the numbers stay, but the report takes these tensors for float
    bare = opened(path).transform(RemoveIdentityOps()).transform(InferShapes())
    cost = inference_cost(bare, discount_sparsity=False)['total_cost']
    with pytest.raises(AssertionError): check_cost(m, cost)
    assert any('FLOAT32' in k for k in cost if k.startswith('op_mac'))

def test_quant_nodes_without_zero_points_become_stock_nodes(executor, tmp_path):
    "Zero-aligned weights: `qonnx` itself can turn them, and the activations, into QuantizeLinear and DequantizeLinear."
    from qonnx.transformation.qonnx_to_qcdq import QuantToQCDQ
    for per_channel in (False, True):
        path = to_qonnx(network('lenet5', '4', weight_quantizer='sawb_zero', per_channel=per_channel), tmp_path/'m.onnx', SHAPE)
        left = [n.name for n in opened(path).transform(QuantToQCDQ()).graph.node if n.op_type == 'Quant']
        assert left == ['0.input_quant']

def test_what_is_between_layers(executor, tmp_path):
    "Groups, dilation, strides that differ, no bias, a batch norm without parameters, a sum, a flatten in forward, an average before the last layer."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.r1 = nn.Conv2d(1, 4, 3, stride=(1, 2), padding=(0, 1)), nn.ReLU()
            self.c2, self.n2, self.r2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU()
            self.drop, self.pool, self.fc = nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 10)
        def forward(self, x):
            x = self.r1(self.c1(x))
            return self.fc(self.pool(self.drop(self.r2(self.n2(self.c2(x)) + x))).flatten(1))
    torch.manual_seed(0)
    m = convert(Net(), bit_policy('4'), digits(8), input_range=RANGE)
    with torch.no_grad(): m.train()(digits(8))
    calibrate(m, digits(8))
    check(executor, tmp_path/'m.onnx', m, digits(8))
    folded = fold_batchnorm(m)
    path = to_qonnx(folded, tmp_path/'f.onnx', SHAPE)
    assert 'BatchNormalization' not in {n.op_type for n in onnx.load(path).graph.node}
    seen = run(executor, path, digits(8))
    for name, o in quant_layers(folded).items(): assert np.array_equal(seen[f'{name}.weight.quant'], o.quant_weight().detach().numpy())
    check_agreement(folded, seen, digits(8))

def test_pixels_on_a_tie(executor, tmp_path):
    "Steps of one half and an odd zero point: a quarter is rounded to 0 by training, and would be to a half if 33 were added first."
    torch.manual_seed(0)
    m = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*676, 10)), bit_policy('4'), digits(4), input_range=(-16.5, 111.))
    iq = m[0].input_quant
    assert (iq.scale, iq.zero_point) == (.5, 33)
    x = torch.linspace(-40, 155.75, 784).view(1, *SHAPE)
    x[0, 0, 0, :4] = torch.tensor([.25, -.25, .75, np.nextafter(np.float32(.25), np.float32(1))])
    seen = run(executor, to_qonnx(m, tmp_path/'m.onnx', SHAPE), x)
    assert np.array_equal(seen['0.input_quant.quant'], iq(x).numpy()) and seen['0.input_quant.quant'][0, 0, 0, :4].tolist() == [0, 0, 1, .5]
    assert {seen['0.input_quant.quant'].min(), seen['0.input_quant.quant'].max()} == {-16.5, 111}

def test_refused(tmp_path):
    path = tmp_path/'m.onnx'
    for model, message in ((get_model('lenet5'), 'is a float network'), (network('lenet5', '4', overrides={'7': 32}), r'4 \(ReLU\) is in float; to_qonnx needs every layer quantized')):
        with pytest.raises(BadInput, match=message): to_qonnx(model, path, SHAPE)
    m = convert(Unusual(nn.Identity()), bit_policy('4'), digits(4), input_range=RANGE)
    m.what = nn.Sigmoid()
    with pytest.raises(BadInput, match=r'what \(Sigmoid\) is no layer that to_qonnx has a rule for'): to_qonnx(m, path, SHAPE)
    m.what = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(BadInput, match=r'what \(BatchNorm2d\) keeps no running statistics'): to_qonnx(m, path, SHAPE)
    m.what = nn.BatchNorm2d(4)
    with pytest.raises(BadInput, match=r'fc \(QLinear\) reads values that no quantizer has put on a grid'): to_qonnx(m, path, SHAPE)
    m.what = nn.Identity()
    m.conv.padding_mode = 'reflect'
    with pytest.raises(BadInput, match=r'conv \(QConv2d\) has another padding'): to_qonnx(m, path, SHAPE)
    with pytest.raises(BadInput, match="can't take an image of shape"): to_qonnx(network('lenet5'), path, (3, 28, 28))
    m = network('lenet5', '4')
    odd = bake(m)
    odd[3].weight.data[0, 0, 0, 0] *= 1.01
    with pytest.raises(BadInput, match=r'3 \(QConv2d\) are on no grid of 4 bits'): to_qonnx(odd, path, SHAPE)
    m = network('small_cnn', '4')
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4*676, 10))
    convert(m, bit_policy('4'), digits(4), input_range=RANGE)
    with torch.no_grad(): m[1].weight[0] = 0
    with pytest.raises(BadInput, match='0 .* channels of scale zero'): to_qonnx(fold_batchnorm(m), path, SHAPE)
    assert not list(tmp_path.iterdir())

def test_onnxruntime_says_what_to_open(tmp_path):
    p = to_qonnx(network('lenet5', '4'), tmp_path/'model.qonnx.onnx', SHAPE)
    with pytest.raises(BadInput, match='is a QONNX file, which stock onnxruntime .* open model.onnx'): onnx_session(p)
    p.write_bytes(p.read_bytes()[:1000])
    with pytest.raises(BadInput, match="can't open"): onnx_session(p)

# --- the transformations of `qonnx` ---

def padded():
    "A first convolution that pads, and a second one behind it."
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10))
    return calibrate(convert(m, bit_policy('4'), digits(8), input_range=RANGE), digits(64))

def test_the_file_asks_for_the_oldest_format_and_states_every_shape(tmp_path):
    "Format 7 is that of opset 13: onnxruntime 1.5 and later know it."
    model = onnx.load(to_qonnx(padded(), tmp_path/'m.onnx', SHAPE))
    assert model.ir_version == onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid('', 13)]) == 7
    stated = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in (*model.graph.value_info, *model.graph.output)}
    assert {o for n in model.graph.node for o in n.output} <= set(stated) and all(all(v) for v in stated.values())
    assert stated['0.input_quant.width'] == [1, 1, 28, 28] and stated['3.weight.quant'] == [4, 4, 3, 3] and stated['logits'] == [1, 10]
    pads = next(n for n in model.graph.node if n.op_type == 'Pad')
    assert pads.input[0] == '0.input_quant.width' and stated[pads.output[0]] == [1, 1, 30, 30]
    assert [list(a.ints) for n in model.graph.node if n.op_type == 'Conv' for a in n.attribute if a.name == 'pads'] == [[0]*4, [1]*4]

TRANSFORMS = {'names': ['general.GiveUniqueNodeNames', 'general.GiveReadableTensorNames'], 'shapes': ['infer_shapes.InferShapes'], 'constants': ['fold_constants.FoldConstants'], 'datatypes': ['infer_datatypes.InferDataTypes'],
    'tidy up': ['infer_shapes.InferShapes', 'fold_constants.FoldConstants', 'general.GiveUniqueNodeNames', 'general.GiveReadableTensorNames', 'infer_datatypes.InferDataTypes', 'general.RemoveStaticGraphInputs'],
    'lower convolutions': ['lower_convs_to_matmul.LowerConvsToMatMul'], 'lower convolutions of known types': ['infer_datatypes.InferDataTypes', 'lower_convs_to_matmul.LowerConvsToMatMul'], 'bias': ['extract_conv_bias.ExtractBiasFromConv'],
    'matrix products': ['gemm_to_matmul.GemmToMatMul'], 'batch norm': ['batchnorm_to_affine.BatchNormToAffine'], 'general': ['general.ConvertSubToAdd', 'general.ConvertDivToMul', 'general.SortGraph'], 'scales': ['extract_quant_scale_zeropt.ExtractQuantScaleZeroPt'],
    'stock nodes': ['qonnx_to_qcdq.QuantToQCDQ', 'infer_shapes.InferShapes'], 'identities': ['remove.RemoveIdentityOps'], 'bipolar': ['bipolar_to_xnor.ConvertBipolarMatMulToXnorPopcount'], 'layouts': ['infer_data_layouts.InferDataLayouts']}

@pytest.fixture(scope='module')
def lowered(tmp_path_factory): return to_qonnx(padded(), tmp_path_factory.mktemp('padded')/'m.onnx', SHAPE)

@pytest.mark.parametrize('name', TRANSFORMS)
def test_transformations_keep_the_answer_of_a_padded_network(executor, lowered, name):
    from importlib import import_module
    from qonnx.core.modelwrapper import ModelWrapper
    m, x = ModelWrapper(str(lowered)), digits(1)
    for o in TRANSFORMS[name]:
        module, cls = o.split('.')
        m = m.transform(getattr(import_module(f'qonnx.transformation.{module}'), cls)())
    got = executor.execute_onnx(m, {m.graph.input[0].name: x.numpy()})[m.graph.output[0].name]
    with torch.no_grad(): assert np.abs(got - padded().eval()(x).numpy()).max() < 1e-5

def test_padded_convolutions_become_matrix_products(executor, lowered):
    "With the quantizers of weights computed beforehand, both of them; with and without inferred types."
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul
    x = digits(1)
    with torch.no_grad(): want = padded().eval()(x).numpy()
    for before in ((), (InferDataTypes(),)):
        m = ModelWrapper(str(lowered)).transform(FoldConstants(exclude_op_types=[]))
        for o in (*before, LowerConvsToMatMul()): m = m.transform(o)
        assert [n.op_type for n in m.graph.node if n.op_type in ('Conv', 'Im2Col')] == ['Im2Col']*2
        assert np.abs(executor.execute_onnx(m, {m.graph.input[0].name: x.numpy()})[m.graph.output[0].name] - want).max() < 1e-5
