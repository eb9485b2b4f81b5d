"""The emulator of AMD GPUs: kernels whose results are known, and each of its checks."""

import struct

import numpy as np
import pytest
import tvm
from amd import kernels
from amd.emulator import ARCHS, Device, EmulatorError

from shardwright.compiler import rocm

N = kernels.THREADS


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def code(arch: str) -> bytes:
    return kernels.code(kernels.all_kernels(arch), rocm.rocm_target(arch))


@pytest.fixture
def device(arch: str, code: bytes) -> Device:
    return Device(arch, code)


def run(device: Device, name: str, out: tuple, *inputs: np.ndarray, blocks: int = 1):
    result = np.zeros(*out)
    device.launch(f"{name}_kernel", (blocks,), (N,), *inputs, result)
    return result


def random(shape: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(shape).standard_normal(shape) * scale).astype(dtype)


def test_every_instruction_is_known(device: Device) -> None:
    assert len(device.listing()) > 500
    assert not [line for line in device.listing() if line.startswith("?")]


def test_add_with_a_ragged_last_block(device: Device) -> None:
    a, b = random(1000), random(1000)[::-1].copy()
    np.testing.assert_array_equal(run(device, "add", (1000, "float32"), a, b, blocks=8), a + b)


def test_sums_through_lds(device: Device) -> None:
    a = random(5 * N)
    got = run(device, "lds_sum", (5, "float32"), a, blocks=5)
    np.testing.assert_allclose(got, a.reshape(5, N).sum(1, dtype="float64"), rtol=1e-5, atol=1e-5)


def test_shuffles_within_a_wave(device: Device, arch: str) -> None:
    wave, a = 32 if arch == "gfx1100" else 64, random(N)
    want = a.reshape(-1, wave).sum(1, dtype="float64").repeat(wave)
    np.testing.assert_allclose(run(device, "shuffles", (N, "float32"), a), want, atol=1e-5)


def test_lanes_through_dpp_and_swizzle(device: Device) -> None:
    a = np.arange(100, 100 + N, dtype="int32")
    got = run(device, "lanes", (4 * N, "int32"), a).reshape(N, 4)
    at = np.arange(N)
    np.testing.assert_array_equal(got[:, 0], a[at ^ 1])
    np.testing.assert_array_equal(got[:, 1], np.where(at % 16 >= 2, a[at - 2], -1))
    np.testing.assert_array_equal(got[:, 2], a[at // 16 * 16 + 15 - at % 16])
    np.testing.assert_array_equal(got[:, 3], a[at ^ 1])


def test_packed_halves(device: Device) -> None:
    a, b, c = (random(8 * N + i, "float16")[: 8 * N] for i in range(3))
    got = run(device, "packed_halves", (8 * N, "float16"), a, b, c)
    want = a.astype("float64") * b + c
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-3)


def test_conversions(device: Device) -> None:
    a = random(N, scale=300)
    a[:4] = 2.5, -2.5, 65504, 1e-7
    got = run(device, "conversions", (6 * N, "float32"), a).reshape(N, 6).T
    whole = a.astype("int32")
    np.testing.assert_array_equal(got[0], whole)
    np.testing.assert_array_equal(got[1], a.astype("float16").astype("float32"))
    np.testing.assert_array_equal(got[2], whole.astype("uint8"))
    np.testing.assert_array_equal(got[3], (a.astype("float64") * 1.1).astype("float32"))
    np.testing.assert_array_equal(got[4], whole.astype("int16"))
    np.testing.assert_allclose(got[5], np.floor(a) + np.round(a), atol=1)


def test_functions(device: Device) -> None:
    a = np.abs(random(N, scale=5)) + 1e-3
    got = run(device, "maths", (6 * N, "float32"), a).reshape(N, 6).T
    x = a.astype("float64")
    want = [np.exp(x), np.log(x), np.sqrt(x), 3.7 / x, np.tanh(x), 1 / np.sqrt(x)]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-6)


def test_lanes_that_take_different_branches(device: Device) -> None:
    a = np.arange(N, dtype="int32")

    def steps(value: int) -> int:
        count = 0
        while value > 1:
            value, count = (value // 2 if value % 2 == 0 else value * 3 + 1), count + 1
        return count

    got = run(device, "divergence", (N, "int32"), a)
    np.testing.assert_array_equal(got, [steps(int(value)) for value in a])


def test_64_bit_integers(device: Device) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**62), 2**62, N) for _ in range(2))
    got = run(device, "wide_integers", (4 * N, "int64"), a, b).reshape(N, 4).T
    np.testing.assert_array_equal(got[0], a * b)
    np.testing.assert_array_equal(got[1], a - (b >> 7))
    np.testing.assert_array_equal(got[2], np.maximum(a, b))
    np.testing.assert_array_equal(got[3], [int(abs(x) // 1000003 * np.sign(x)) for x in a.tolist()])


def test_private_memory(device: Device) -> None:
    a = 2 * np.arange(N, dtype="int32") + 1
    got = run(device, "private_memory", (N, "int32"), a)

    def held(factor: int) -> list[int]:
        return [i for _, i in sorted((i * factor % 64, i) for i in range(64))]

    want = [held(a[t])[a[64 + t % 32] % 64] + held(a[t])[a[t] % 64] for t in range(N)]
    np.testing.assert_array_equal(got, want)


def test_atomics(device: Device) -> None:
    a = np.arange(6 * N, dtype="int32")
    assert run(device, "atomics", (1, "int32"), a, blocks=6)[0] == a.sum()


def test_matrix_instructions(device: Device) -> None:
    a, b = random(256, "float16"), random(257, "float16")[:256]
    got = run(device, "matrix", (256, "float32"), a, b).reshape(16, 16)
    want = a.reshape(16, 16).astype("float64") @ b.reshape(16, 16).astype("float64").T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ---- checks ----------------------------------------------------------------------------------


def indices(**changed: int) -> np.ndarray:
    out = np.arange(N, dtype="int32")
    for at, value in changed.items():
        out[int(at[1:])] = value
    return out


@pytest.mark.parametrize("index", [-5, N, N + 900, 2**31 - 1])
def test_global_reads_out_of_bounds(device: Device, index: int) -> None:
    with pytest.raises(EmulatorError, match=r"gather_.*global_load_.*lane 3 .* out of bounds"):
        run(device, "gather", (N, "int32"), indices(_3=index), indices())
    got = run(device, "gather", (N, "int32"), indices()[::-1].copy(), indices())
    np.testing.assert_array_equal(got, indices()[::-1])


@pytest.mark.parametrize("index", [-1, N])
def test_global_writes_out_of_bounds(device: Device, index: int) -> None:
    with pytest.raises(EmulatorError, match=r"scatter_kernel.*wave .*writes 4 bytes out of bounds"):
        run(device, "scatter", (N, "int32"), indices(_70=index))


def test_lds_reads_out_of_bounds(device: Device) -> None:
    everywhere = np.append(indices(_3=N), N).astype("int32")
    with pytest.raises(EmulatorError, match=f"lane 3 .* LDS out of bounds at {4 * N}"):
        run(device, "lds_gather", (N, "int32"), everywhere)


def test_lds_that_nothing_has_written(device: Device) -> None:
    with pytest.raises(EmulatorError, match="reads LDS at 508, which nothing has written"):
        run(device, "lds_gather", (N, "int32"), np.append(indices(), N - 1).astype("int32"))
    got = run(device, "lds_gather", (N, "int32"), np.append(indices(), N).astype("int32"))
    np.testing.assert_array_equal(got, indices())


def test_lds_of_another_wave_without_a_barrier(arch: str, code: bytes) -> None:
    far = indices(_127=0)
    np.testing.assert_array_equal(run(Device(arch, code), "exchange", (N, "int32"), far), far)
    barrier, nop = (0xBFBD0000 if arch == "gfx1100" else 0xBF8A0000), 0xBF800000
    unguarded = code.replace(barrier.to_bytes(4, "little"), nop.to_bytes(4, "little"))
    with pytest.raises(EmulatorError, match="which wave 0 wrote with no barrier between"):
        run(Device(arch, unguarded), "exchange", (N, "int32"), far)


def test_an_instruction_that_is_not_known(arch: str, code: bytes) -> None:
    at = code.index(_first_words(arch, code))
    damaged = code[:at] + b"\xff\xff\xff\xff" + code[at + 4 :]
    with pytest.raises(EmulatorError, match=r"add_kernel\+0x0: .*ffffffff.*is not known"):
        run(Device(arch, damaged), "add", (1000, "float32"), random(1000), random(1000), blocks=8)


def _first_words(arch: str, code: bytes) -> bytes:
    """The first 16 bytes of `add_kernel`, from the symbol table by way of the section headers."""
    sections, (size, count, _) = (
        struct.unpack_from("<Q", code, 40)[0],
        struct.unpack_from("<HHH", code, 58),
    )
    tables = [struct.unpack_from("<IIQQQQIIQQ", code, sections + i * size) for i in range(count)]
    for table in tables:
        if table[1] != 11:  # SHT_DYNSYM
            continue
        strings = tables[table[6]][4]
        for at in range(table[4], table[4] + table[5], 24):
            name, _, _, section, address, _ = struct.unpack_from("<IBBHQQ", code, at)
            end = code.index(b"\0", strings + name)
            if code[strings + name : end] == b"add_kernel":
                start = address - tables[section][3] + tables[section][4]
                return code[start : start + 16]
    raise AssertionError("no add_kernel")


def test_code_for_another_architecture(arch: str, code: bytes) -> None:
    other = next(name for name in ARCHS if name != arch)
    with pytest.raises(EmulatorError, match=f"is for {arch}, the device is {other}"):
        Device(other, code)


# ---- the miscompiles that the compiler has remedies for ----------------------------------------


def test_a_barrier_that_waits_for_nothing(arch: str) -> None:
    config = dict(rocm.rocm_target(arch).export())
    attributes = [a for a in rocm.ARCHS[arch].attributes if a != "-back-off-barrier"]
    with rocm.without_device_warnings():
        target = tvm.target.Target(config | {"mattr": attributes})
    func = kernels.all_kernels(arch)["bare_barrier"]
    device = Device(arch, kernels.code({"bare_barrier": func}, target))
    with pytest.raises(EmulatorError, match="barrier before its LDS accesses were waited for"):
        run(device, "bare_barrier", (N, "int32"), indices())


def test_shared_memory_through_global_pointers(arch: str, device: Device) -> None:
    """Storage rewrite, which the remedy disables, makes TVM use LDS pointers as global ones."""
    np.testing.assert_array_equal(run(device, "two_buffers", (N, "float32"), indices()), indices())
    func = kernels.all_kernels(arch)["two_buffers"]
    data = kernels.code({"two_buffers": func}, rocm.rocm_target(arch), config={})
    with pytest.raises(EmulatorError, match=r"global_load_.* out of bounds"):
        run(Device(arch, data), "two_buffers", (N, "float32"), indices())
