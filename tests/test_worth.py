"What a network is worth as a file: answers against oracles, times only for sanity, damage and resuming."
import errno, json, logging, os, shutil, threading
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
import qisal.data
from qisal import run as R, worth as W
from qisal.core import BadInput, RunSpec, read_json, set_seed, write_json
from qisal.data import get_dls
from qisal.deploy import _sealed, float_onnx, integer_network, load_model, save_model
from qisal.metrics import predict
from qisal.models import get_model
from qisal.quant import bit_policy, convert, pacts, quant_layers


# ---------------------------------------------------------------- time

def test_interleave_takes_turns_and_throws_the_first_rounds_away():
    calls = []
    s = W.interleave(dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')), 3, warmup=2)
    assert calls == ['a', 'b']*5 and len(s['a']) == len(s['b']) == 3 and (s['a'] >= 0).all()

def test_ratio_by_hand():
    r = W.ratio([2., 6., 4., 9.], [1., 2., 4., 3.], times=.5)
    assert r == dict(value=5., low=np.quantile([4, 6, 2, 6], .25), high=6., seconds=5., n=4)

def test_the_benchmark_has_them_still():
    import qisal.bench as B
    assert B.interleave is W.interleave and B.ratio is W.ratio


# ---------------------------------------------------------------- files by hand

class Linear(nn.Module):
    "Logits that can be worked out by hand: each pixel is one."
    def __init__(self, scale=1.):
        super().__init__()
        self.flat, self.fc = nn.Flatten(), nn.Linear(4, 4, bias=False)
        with torch.no_grad(): self.fc.weight.copy_(scale*torch.eye(4))
    def forward(self, x): return self.fc(self.flat(x))

@pytest.fixture
def hand(tmp_path): return float_onnx(Linear(), tmp_path/'hand.onnx', (1, 2, 2))

X = torch.tensor([[.9, .1, .2, .3], [.1, .8, .2, .3], [.1, .2, .7, .3], [.5, .6, .7, .8], [.9, .1, .1, .1]]).view(-1, 1, 2, 2)
Y = torch.tensor([0, 1, 0, 3, 2])  # the largest pixel in three of five

@pytest.mark.parametrize('batch', [1, 2, 5, 100])
def test_accuracy_by_hand(hand, batch):
    got = W.file_accuracy(hand, (X, Y), batch=batch)
    assert got['accuracy'] == .6 and got['n_test'] == 5
    np.testing.assert_allclose(got['logits'], X.flatten(1).numpy(), atol=1e-6)

def test_a_loader_that_shuffles_and_drops_is_read_in_full_and_in_order():
    dls = get_dls('mnist', sample=True, batch_size=64, device='cpu')
    set_seed(0)
    net = get_model('lenet5', 10, 1, 28).eval()
    import tempfile
    with tempfile.TemporaryDirectory() as d: got = W.file_accuracy(float_onnx(net, Path(d)/'f.onnx', (1, 28, 28)), dls.train)
    logits, y = predict(net, dls.train)
    assert got['n_test'] == len(dls.train.dataset) > 64*(len(dls.train.dataset)//64)
    np.testing.assert_allclose(got['logits'], logits.numpy(), atol=1e-4)

@pytest.mark.parametrize('x,y,words', [
    (torch.zeros(2, 1, 3, 2), torch.zeros(2, dtype=torch.long), '1x2x2 values an image, these images have 1x3x2'), (torch.zeros(2, 3, 2, 2), torch.zeros(2, dtype=torch.long), 'these images have 3x2x2'),
    (X, Y + 4, 'labels go up to 7'), (X, Y[:3], 'label'), (X, -1 - Y, 'labels start at 0'), (X.int(), Y, 'float images'), (X[:0], Y[:0], 'non-empty'), (X*float('nan'), Y, 'no finite numbers')], ids=lambda o: o if isinstance(o, str) else '')
def test_images_that_do_not_fit(hand, x, y, words):
    with pytest.raises(BadInput, match=words): W.file_accuracy(hand, (x, y))

def test_files_that_do_not_fit(tmp_path, hand):
    raw = hand.read_bytes()
    (tmp_path/'cut.onnx').write_bytes(raw[:len(raw)//2])
    (tmp_path/'text.onnx').write_text('hello', encoding='utf-8')
    for name in ('none.onnx', 'cut.onnx', 'text.onnx'):
        for f in (lambda p: W.file_accuracy(p, (X, Y)), lambda p: W.latency_ratio(p, hand, X), lambda p: W.latency_ratio(hand, p, X), lambda p: W.static_int8(p, tmp_path/'out.onnx', X)):
            with pytest.raises(BadInput, match=name): f(tmp_path/name)
    assert not (tmp_path/'out.onnx').exists()

@pytest.mark.parametrize('kw', [dict(batch=0), dict(batch=1.5), dict(repeats=0), dict(threads=0), dict(images=X[0]), dict(images=X[:0]), dict(images=torch.zeros(2, 3, 2, 2))], ids=str)
def test_latency_refuses(hand, kw):
    with pytest.raises(BadInput): W.latency_ratio(hand, hand, **{'images': X, 'repeats': 1, **kw})

@pytest.mark.parametrize('batch', [1, 3, 64])
def test_latency_of_a_file_over_itself(hand, batch):
    "Fewer images than the batch are repeated; times are positive and in order, no more is asked of them."
    r = W.latency_ratio(hand, hand, X[:2], batch, repeats=5)
    assert (r['batch'], r['threads'], r['n']) == (batch, 1, 5) and 0 < r['low'] <= r['ratio'] <= r['high'] and r['ms'] > 0 and r['float_ms'] > 0


# ---------------------------------------------------------------- quantized after training

@pytest.fixture(scope='module')
def digits(): return get_dls('mnist', sample=True, batch_size=32, device='cpu')

@pytest.fixture(scope='module')
def lenet(digits):
    "A float network that knows some digits."
    set_seed(0)
    net = get_model('lenet5', 10, 1, 28)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(3):
        for x, y in digits.train:
            opt.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
    return net.eval()

def test_static_int8_is_near_and_safe_on_every_processor(tmp_path, digits, lenet):
    import onnx
    from onnx import numpy_helper
    floats = float_onnx(lenet, tmp_path/'f.onnx', (1, 28, 28))
    small = W.static_int8(floats, tmp_path/'q.onnx', W.calibration_images(digits, 256))
    a, b = (W.file_accuracy(o, digits.test) for o in (floats, small))
    assert abs(a['accuracy'] - b['accuracy']) < .02 and np.abs(a['logits'] - b['logits']).mean() < .1*np.abs(a['logits']).mean()
    weights = [v for o in onnx.load(small).graph.initializer if (v := numpy_helper.to_array(o)).dtype == np.int8 and v.ndim > 1]
    assert len(weights) == 5 and all(np.abs(v.astype(int)).max() <= 64 for v in weights)  # seven bits: two products can't overflow 16
    assert sum(v.size for v in weights) < small.stat().st_size < floats.stat().st_size/3

def test_static_int8_is_quiet_and_leaves_the_log_alone(tmp_path, hand, capfd):
    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.root.manager.disable
    W.static_int8(hand, tmp_path/'q.onnx', X)
    assert root.handlers == handlers and logging.root.manager.disable == level
    out, err = capfd.readouterr()
    assert out == err == ''

@pytest.mark.parametrize('images,words', [(X[:0], 'no images'), (torch.zeros(2, 1, 3, 3), 'these images have')], ids=['none', 'other size'])
def test_static_int8_refuses(tmp_path, hand, images, words):
    with pytest.raises(BadInput, match=words): W.static_int8(hand, tmp_path/'q.onnx', images)
    assert not (tmp_path/'q.onnx').exists()

def test_static_int8_writes_whole_or_not_at_all(tmp_path, hand, monkeypatch):
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): W.static_int8(hand, tmp_path/'q.onnx', X)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['hand.onnx']

def test_static_int8_refuses_a_quantized_file(tmp_path, hand):
    once = W.static_int8(hand, tmp_path/'q.onnx', X)
    with pytest.raises(BadInput, match='quantized already'): W.static_int8(once, tmp_path/'twice.onnx', X)

@pytest.mark.parametrize('bits,per_channel', [('8', False), ('4', False), ('2', True), ('w2a4', False)])
def test_post_training_leaves_the_network_and_fits_its_grids(digits, lenet, bits, per_channel):
    before = {k: v.clone() for k, v in lenet.state_dict().items()}
    images = W.calibration_images(digits, 128)
    small = W.post_training(lenet, images, bits, per_channel=per_channel, input_range=digits.train.dataset.input_range)
    assert not quant_layers(lenet) and all(torch.equal(v, before[k]) for k, v in lenet.state_dict().items())
    layers = list(quant_layers(small).values())
    assert not small.training and [m.w_bits for m in layers] == [w for w, _ in bit_policy(bits).layers(5)]
    for m in layers:
        for w in m.weight if per_channel else [m.weight]: assert m.baked and len(w.unique()) <= 2**m.w_bits
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda m, x, n=n: seen.update({n: x[0].max().item()})) for n, m in pacts(small).items()]
    with torch.no_grad(): small(images)
    for h in hooks: h.remove()
    assert len(seen) == 4 and all(0 < m.alpha.item() <= seen[n]*1.0001 for n, m in pacts(small).items())  # no clip above what occurs

def test_eight_bits_after_training_cost_little_and_two_cost_more(digits, lenet):
    acc = lambda m: float((predict(m, digits.test)[0].argmax(1) == predict(m, digits.test)[1]).float().mean())
    images = W.calibration_images(digits)
    got = {b: acc(W.post_training(lenet, images, b, input_range=digits.train.dataset.input_range)) for b in ('8', '2')}
    assert abs(got['8'] - acc(lenet)) < .02 and got['2'] < got['8']

def test_post_training_refuses(digits, lenet):
    images = W.calibration_images(digits, 8)
    for args, words in (((lenet, images, '32'), 'float model'), ((lenet, images, '5/2'), 'bits'), ((lenet, images[0], '4'), 'N x C x H x W'), ((lenet, images[:0], '4'), 'at least one image'),
                        ((W.post_training(lenet, images, '4'), images, '4'), 'quantized already'), ((lenet, images, '4', 'sawbb'), 'sawbb')):
        with pytest.raises(BadInput, match=words): W.post_training(*args)

def test_calibration_images_are_training_images(digits):
    "... each once, drawn by the seed, never test or validation images."
    a, b, c = (W.calibration_images(digits, 100, s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and len(a) == 100 and len(a.flatten(1).unique(dim=0)) == 100
    rows = lambda x: {o.tobytes() for o in digits.train.dataset.denormalize(x).numpy()}
    train, test = ({o.tobytes() for o in d.dataset.x.numpy()} for d in (digits.train, digits.test))
    assert rows(a) <= train and not rows(a) & test
    assert len(W.calibration_images(digits, 10**6)) == len(digits.train.dataset)


# ---------------------------------------------------------------- runs

SPEC = RunSpec(arch='lenet5', sample=True, epochs=1, batch_size=32)

def lay_down(out, spec, dls, net=None):
    "The folder of a finished run."
    folder = Path(out)/'runs'/spec.run_id
    folder.mkdir(parents=True)
    if net is None:
        set_seed(spec.seed)
        net = get_model(spec.arch, len(dls.vocab), dls.n_in, dls.size).eval()
    if spec.bits != '32':
        import copy
        net = convert(copy.deepcopy(net), bit_policy(spec.bits), dls.one_batch()[0], input_range=dls.train.dataset.input_range).eval()
    logits, y = predict(net, dls.test)
    save_model(net, folder/'model', classes=dls.vocab, n_in=dls.n_in, size=dls.size, stats=dls.stats, extra=dict(spec=spec.to_dict()))
    write_json(folder/'spec.json', spec.to_dict())
    m = dict(format=R.RESULTS_FORMAT, run_id=spec.run_id, spec=spec.to_dict(), accuracy=float((logits.argmax(1) == y).float().mean()), n_test=len(y), masking={}, alphas=[], cost=dict(bops=1), timing={}, provenance={}, data=dls.checksums)
    write_json(folder/'metrics.json', R._seal({**m, 'fingerprint': {}}))
    return folder

@pytest.fixture
def study(tmp_path, digits, lenet):
    out = tmp_path/'study'
    return out, {b: lay_down(out, RunSpec.from_dict({**SPEC.to_dict(), 'bits': b}), digits, lenet) for b in ('32', '4')}

@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(W, 'SAMPLE_ROUNDS', {1: 2, 256: 1})

def measured(folder): return W.is_measured(folder, read_json(folder/'metrics.json'))

def test_a_quantized_run(study, digits, quick):
    out, folders = study
    s = W.measure_run(folders['4'], digits)
    net, config = load_model(folders['4']/'model')
    x, y = (torch.cat(o) for o in zip(*digits.test))
    oracle = integer_network(net, (1, 28, 28))(x).argmax(1)
    with torch.no_grad(): trained = net(x).argmax(1).numpy()
    assert s['accuracy'] == (oracle == y.numpy()).mean() and s['differ'] == (oracle != trained).sum() <= 1 and s['n_test'] == 1000
    export = folders['4']/'export'
    assert s['bytes']['onnx'] == os.path.getsize(export/'model.onnx') and s['bytes']['safetensors'] == os.path.getsize(export/'model.safetensors')
    weights = 6*25 + 16*6*25 + 120*400 + 84*120 + 10*84
    assert s['bits_per_weight'] == 8*s['bytes']['safetensors']/weights and s['bytes']['float_onnx'] > 4*weights
    assert [(o['batch'], o['threads'], o['n']) for o in s['latency']] == [(1, 1, 2), (256, 1, 1)]
    assert s == read_json(folders['4']/'shipped.json') and s['kind'] == 'quantized' and s['provenance']['versions']['onnxruntime'] and str(out) not in (folders['4']/'shipped.json').read_text(encoding='utf-8')
    again, c = load_model(export)
    with torch.no_grad(): assert (again(x[:50]).argmax(1).numpy() == trained[:50]).all()
    assert c['extra'] == config['extra'] and measured(folders['4'])

def test_a_float_run(study, digits, lenet):
    s = W.measure_run(study[1]['32'], digits)
    x, y = (torch.cat(o) for o in zip(*digits.test))
    with torch.no_grad(): assert abs(s['accuracy'] - (lenet(x).argmax(1) == y).float().mean().item()) < 1e-3 and s['differ'] <= 1
    assert [(o['by'], o['bits']) for o in s['after_training']] == [('onnxruntime', '8'), ('qisal', '8'), ('qisal', '4'), ('qisal', '2')]
    for o in s['after_training'][1:]:
        small = W.post_training(lenet, W.calibration_images(digits, W.SAMPLE_CALIBRATION, 0), o['bits'], input_range=digits.train.dataset.input_range)
        with torch.no_grad(): assert abs(o['accuracy'] - (small(x).argmax(1) == y).float().mean().item()) < 2e-3
    assert s['kind'] == 'float' and 'latency' not in s and s['bytes']['onnx'] > 4*61_000 and not (study[1]['32']/'export').exists()

def test_a_residual_network_on_few_images_of_a_folder(tmp_path, quick):
    "Batch norm, additions, three channels, fewer test images than a batch of 256, data that is read from a folder."
    g = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/'images'/c).mkdir(parents=True)
        for i in range(20): Image.fromarray(g.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path/'images'/c/f'{i}.png')
    specs = [RunSpec(dataset=f"folder:{tmp_path/'images'}", arch='resnet20', bits=b, batch_size=4, epochs=1) for b in ('32', '4')]
    for s in specs: lay_down(tmp_path/'study', s, get_dls(s, device='cpu'))
    W.ROUNDS, kept = {1: 1, 256: 1}, W.ROUNDS
    try: found = R.measure_study(tmp_path/'study', say=lambda o: None)
    finally: W.ROUNDS = kept
    assert sorted(found['measured']) == sorted(o.run_id for o in specs) and not found['failed']
    full, small = (read_json(tmp_path/'study'/'runs'/o.run_id/'shipped.json') for o in specs)
    assert full['n_test'] == small['n_test'] == 8 and len(full['after_training']) == 4 and full['calibration'] == 28 and small['latency'][1]['batch'] == 256

@pytest.mark.parametrize('how,words', [
    (lambda f: (f/'metrics.json').unlink(), 'not finished'), (lambda f: (f/'metrics.json').write_text((f/'metrics.json').read_text(encoding='utf-8').replace('"n_test": 1000', '"n_test": 999'), encoding='utf-8'), 'not finished'),
    (lambda f: shutil.rmtree(f/'model'), 'no model folder'), (lambda f: os.truncate(f/'model'/'model.safetensors', 100), 'truncated'), (lambda f: (f/'model'/'x.pkl').write_bytes(b'\x80\x04.'), 'pickle'),
    (lambda f: rewrite(f, data={'x_test': '0'*64}), 'checksums differ'), (lambda f: rewrite(f, spec={**json.loads((f/'spec.json').read_text(encoding='utf-8')), 'epochs': 7}), 'of another run')], ids=lambda o: o if isinstance(o, str) else '')
def test_what_can_not_be_measured_leaves_nothing(study, digits, how, words):
    folder = study[1]['4']
    how(folder)
    before = sorted(o.name for o in folder.iterdir())
    with pytest.raises(BadInput, match=words): W.measure_run(folder, digits)
    assert sorted(o.name for o in folder.iterdir()) == before

def rewrite(folder, **changed): write_json(folder/'metrics.json', R._seal({**read_json(folder/'metrics.json'), **changed}))

def put(folder, **found):
    "A measurement without measuring."
    return W.write_shipped(folder, read_json(folder/'metrics.json'), {**dict(kind='float', accuracy=.5, n_test=1000, differ=0, bytes=dict(onnx=10, float_onnx=10), bits_per_weight=32.), **found})

def test_a_measurement_belongs_to_its_metrics_its_code_and_itself(study, monkeypatch):
    folder = study[1]['32']
    m = read_json(folder/'metrics.json')
    assert W.read_shipped(folder, m) is None and not measured(folder)
    s, path = put(folder), folder/'shipped.json'
    assert W.read_shipped(folder, m) == s and measured(folder)
    text = path.read_text(encoding='utf-8')
    for bad in (text.replace('"accuracy": 0.5', '"accuracy": 0.9'), text[:100], '', '[]', json.dumps(_sealed({**s, 'format': 2})), json.dumps(_sealed({**s, 'metrics': '0'*64}))):
        path.write_text(bad, encoding='utf-8')
        assert W.read_shipped(folder, m) is None and not measured(folder)
    path.write_text(text, encoding='utf-8')
    monkeypatch.setattr(W, '_measured_by', lambda: '0'*64)
    assert W.read_shipped(folder, m) == s and not measured(folder)  # still shown, to be measured again
    monkeypatch.undo()
    rewrite(folder, accuracy=.1)
    assert not measured(folder)

def test_the_code_that_measures_does_not_touch_the_fingerprint_of_runs():
    from qisal.core import RUN_MODULES
    assert not {'worth', 'deploy', 'run', 'report'} & set(RUN_MODULES)


# ---------------------------------------------------------------- studies

def test_a_study_is_measured_once(study, quick):
    out, folders = study
    said = []
    found = R.measure_study(out, say=said.append)
    assert sorted(found['measured']) == sorted(o.name for o in folders.values()) and not found['failed'] and len(said) == 2
    assert any('1/' in o and 'of float' in o and 'with 256 images' in o for o in said)
    df = R.summary(out).set_index('bits')
    s = {b: read_json(f/'shipped.json') for b, f in folders.items()}
    for b in s: assert df.file_bytes[b] == s[b]['bytes']['onnx'] and df.file_accuracy[b] == s[b]['accuracy']
    assert df.latency_1['4'] == s['4']['latency'][0]['ratio'] and df.latency_256['4'] == s['4']['latency'][1]['ratio'] and np.isnan(df.latency_1['32'])
    assert (out/'summary.csv').read_text(encoding='utf-8') == R.summary(out).to_csv(index=False)
    before = {o: o.stat().st_mtime_ns for o in out.rglob('*') if o.is_file() and '.locks' not in o.parts}
    again = R.measure_study(out, say=said.append)
    assert again['measured'] == [] and sorted(again['before']) == sorted(found['measured']) and len(said) == 2
    assert {o: o.stat().st_mtime_ns for o in before} == before

def test_one_failure_does_not_cost_the_others_and_is_tried_again(study, quick):
    out, folders = study
    whole = (folders['32']/'model'/'model.safetensors').read_bytes()
    os.truncate(folders['32']/'model'/'model.safetensors', 1000)
    said, metrics = [], (folders['32']/'metrics.json').read_bytes()
    found = R.measure_study(out, say=said.append)
    assert list(found['failed']) == [folders['32'].name] and found['measured'] == [folders['4'].name]
    assert 'truncated' in found['failed'][folders['32'].name] and any('NOT MEASURED (BadInput: model.safetensors' in o for o in said)
    run = {o['run_id']: o for o in R.load_runs(out)}[folders['32'].name]
    assert run['status'] == 'done' and 'truncated' in run['shipped']['error']['message'] and str(out) not in json.dumps(run['shipped']) and (folders['32']/'metrics.json').read_bytes() == metrics
    assert R.summary(out).set_index('bits').error['32'].startswith('not measured as a file: BadInput: model.safetensors')
    (folders['32']/'model'/'model.safetensors').write_bytes(whole)
    assert R.measure_study(out, say=said.append)['measured'] == [folders['32'].name] and R.summary(out).set_index('bits').error['32'] == ''

def test_a_failure_does_not_replace_an_older_measurement(study, monkeypatch):
    out, folders = study
    monkeypatch.setattr(W, '_measured_by', lambda: 'older code')
    s = put(folders['4'])
    monkeypatch.undo()
    def broken(*a, **k): raise RuntimeError('broken')
    monkeypatch.setattr(W, 'measure_run', broken)
    assert R.measure_study(out, [folders['4'].name], say=lambda o: None)['failed'] == {folders['4'].name: 'RuntimeError: broken'}
    assert read_json(folders['4']/'shipped.json') == s

def test_runs_without_a_model_are_left_out(study, monkeypatch):
    out, folders = study
    for f in folders.values(): shutil.rmtree(f/'model')
    assert sorted(R.measure_study(out)['without']) == sorted(o.name for o in folders.values()) and not (folders['4']/'shipped.json').exists()
    monkeypatch.setattr(W, '_measured_by', lambda: 'older code')
    put(folders['4'])
    monkeypatch.undo()
    found = R.measure_study(out)
    assert found['before'] == [folders['4'].name] and found['without'] == [folders['32'].name]  # measured once, by older code: that stands

def test_only_what_was_asked_for(study, monkeypatch):
    out, folders = study
    monkeypatch.setattr(W, 'measure_run', lambda folder, *a, **k: put(folder))
    assert R.measure_study(out, [folders['4'].name], say=lambda o: None) == dict(measured=[folders['4'].name], before=[], without=[], failed={})

def test_other_runs_are_counted_and_a_locked_run_is_waited_for(study, monkeypatch):
    out, folders = study
    seen, said = [], []
    monkeypatch.setattr(W, 'measure_run', lambda folder, *a, others=0, **k: (seen.append(others), put(folder))[1])
    with R.RunLock(out, 'another-run'): R.measure_study(out, [folders['4'].name], say=said.append)
    assert seen == [1] and R._going_on(out) == 0
    with R.RunLock(out, folders['32'].name):
        t = threading.Thread(target=R.measure_study, args=(out,), kwargs=dict(say=said.append))
        t.start()
        t.join(.5)
        assert t.is_alive() and len(seen) == 1 and 'another process' in said[-1]
    t.join(20)
    assert len(seen) == 2

@pytest.mark.parametrize('code,words', [(errno.ENOSPC, 'is full'), (errno.EACCES, 'cannot be written')])
def test_a_full_disk_is_said_and_is_no_failure_of_the_run(study, monkeypatch, code, words):
    out, folders = study
    def full(*a, **k): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(W, 'measure_run', full)
    with pytest.raises(BadInput, match=words): R.measure_study(out, say=lambda o: None)
    assert not list(out.rglob('shipped.json'))

def test_data_is_read_once_for_runs_that_share_it(study, monkeypatch):
    out, folders = study
    reads, real = [], W.run_data
    monkeypatch.setattr(W, 'run_data', lambda m: (reads.append(m['run_id']), real(m))[1])
    monkeypatch.setattr(W, 'measure_run', lambda folder, dls, **k: put(folder))
    assert len(R.measure_study(out, say=lambda o: None)['measured']) == 2 and len(reads) == 1

def test_no_study(tmp_path):
    with pytest.raises(BadInput, match='no results folder'): R.measure_study(tmp_path)
