"Specs: numbers for names, fields that are younger than a stored run, batches that fit."
import io, json

import numpy as np, pandas as pd, pytest

from qisal.core import BITS, BadInput, RunSpec, as_bits, complete_fields, fitting_batch

FOUR = (4, 4., '4', '4.0', ' 4', np.int64(4), np.uint8(4), np.float32(4))

@pytest.mark.parametrize('value', FOUR, ids=repr)
def test_bits_may_be_numbers(value):
    spec = RunSpec(bits=value)
    assert as_bits(value) == '4' and spec == RunSpec(bits='4') and spec.run_id == 'mnist-small_cnn-b4-plain-s0' and spec.fingerprint == RunSpec(bits='4').fingerprint

@pytest.mark.parametrize('value', [4.5, '5', True, None, float('nan'), float('inf'), 'four', (4,)], ids=repr)
def test_what_names_no_bits_is_refused(value):
    with pytest.raises(BadInput, match='bits .* is unknown; allowed: 32, 8, 4'): RunSpec(bits=value)

@pytest.mark.parametrize('value', FOUR, ids=repr)
def test_bits_may_be_numbers_in_policies(value):
    from qisal.quant import BitPolicy, bit_policy
    assert bit_policy(value, value) == bit_policy('4', 4) == BitPolicy((value, value), (value, value), value)
    assert all(type(o) is int for o in (*BitPolicy((value, value)).early, BitPolicy(ends=value).ends))

def test_bits_may_be_numbers_in_a_grid_an_override_and_a_table():
    from qisal.interpret import accuracy_by_setting
    from qisal.quant import _override
    from qisal.run import grid
    assert [o.bits for o in grid(bits=[32, 4., '2.0'], guided=['off'])] == ['32', '4', '2']
    for v in FOUR: assert _override('a', (8, 8), {'*': v}) == (4, 4)
    assert _override('a', (8, 8), {'*': '32.0'}) == (32, 32)
    df = pd.read_csv(io.StringIO('bits,guided,accuracy\n4,False,.9\n4,True,.8\n32,False,.95\n'))
    assert accuracy_by_setting(df).bits.tolist() == ['32', '4', '4']

def test_a_spec_survives_a_csv_file():
    "Integers come back as numpy's, whole floats too; the JSON and the fingerprint are the same."
    spec = RunSpec(dataset='folder:photos', bits='2', seed=7, epochs=3, n_train=100, batch_size=16, size=48, first_last_bits=4, frac=.25, lr=.01)
    df = pd.read_csv(io.StringIO(pd.DataFrame([spec.to_dict()] * 2).drop(columns='attributions').to_csv(index=False)))
    for row in (df.iloc[0].to_dict(), df.astype({o: float for o in ('seed', 'epochs', 'n_train', 'batch_size', 'size', 'first_last_bits', 'bits')}).iloc[0].to_dict()):
        again = RunSpec.from_dict(row)
        assert again == spec and json.loads(again.to_json()) == json.loads(spec.to_json()) and again.fingerprint == spec.fingerprint

@pytest.mark.parametrize('field', ['seed', 'epochs', 'n_train', 'batch_size', 'first_last_bits', 'lr', 'frac', 'lam', 'fill', 'mask_fill', 'guided'])
def test_numpy_values_can_be_written(field):
    old = getattr(RunSpec(), field)
    value = np.bool_(True) if field == 'guided' else np.float32(.5) if isinstance(old, (float, str)) else np.int64(8)
    spec = RunSpec(**{field: value})
    assert getattr(RunSpec.from_dict(json.loads(spec.to_json())), field) == value and len(spec.fingerprint) == 64

# ---------------------------------------------------------------- fields that came later
OLD_RUN = dict(dataset='mnist', bits='32', guided=True, seed=0, arch='small_cnn', epochs=5, n_train=None, sample=False, batch_size=128, lr=.002, valid_pct=.1, weight_quantizer='sawb',
    per_channel=False, first_last_bits=8, frac=.5, fill='random', lam=1., signed=True, mode='exact', attributions=['gradient', 'random'], mask_fill='corner')

def test_a_run_from_before_size_keeps_its_name_and_its_meaning():
    "The name was computed by the library that knew no `size`."
    spec = RunSpec.from_dict(OLD_RUN)
    assert spec.run_id == 'mnist-small_cnn-fp32-guided-s0-19eabf99' and spec.size is None
    old = RunSpec.from_dict({**OLD_RUN, 'dataset': 'folder:photos'})
    assert old.size == 32 and old.run_id == 'photos-small_cnn-fp32-guided-s0-60a83e06' and complete_fields({**OLD_RUN, 'size': 64})['size'] == 64
    assert len({RunSpec.from_dict({**OLD_RUN, 'dataset': 'folder:photos', 'size': o}).run_id for o in (None, 28, 32, 64)}) == 4

def test_sizes():
    assert RunSpec(dataset='folder:photos').size is None and RunSpec(dataset='folder:photos', size=96.).size == 96
    for bad in (7, 1025, 9.5, '64', True):
        with pytest.raises(BadInput, match='size is'): RunSpec(dataset='folder:photos', size=bad)
    with pytest.raises(BadInput, match='size is for folder:PATH only; the images of cifar10'): RunSpec(dataset='cifar10', size=32)

# ---------------------------------------------------------------- batches that fit
def test_default_batches_make_four_steps():
    for n in range(1, 2000):
        b = fitting_batch(n)
        assert 1 <= b <= min(n, 128) and (b <= 4 or (n//b >= 4 and b & (b - 1) == 0)) and (b == 128 or n//(2*b) < 4)
    assert fitting_batch(512) == fitting_batch(10**6) == 128

def test_batch_of_a_spec():
    assert RunSpec().batch_size == RunSpec(batch_size=128).batch_size == 128 and RunSpec() == RunSpec(batch_size=128)
    assert RunSpec(n_train=100).batch_size == 16 and RunSpec(n_train=100, batch_size=50).batch_size == 50 and RunSpec(dataset='folder:photos').batch_size is None
    assert all(RunSpec(bits=b).batch_size == 128 for b in BITS)
