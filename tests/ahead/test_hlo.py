"""FLOPs, bytes, collectives and kernels of a program counted by hand, and of compiled ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.ahead import hlo

PROGRAM = r"""
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64,32]{1,0})->f32[64,16]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%matmul_computation (p.0: bf16[64,32], p.1: bf16[32,16]) -> bf16[64,16] {
  %p.0 = bf16[64,32]{1,0} parameter(0)
  %p.1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.0 = bf16[64,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%slice_computation (p.2: f32[8,100], p.3: s32[]) -> f32[1,100] {
  %p.2 = f32[8,100]{1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,100]{1,0} dynamic-slice(%p.2, %p.3, %zero), dynamic_slice_sizes={1,100}
}

%update_computation (p.4: f32[8,100], p.5: f32[1,100], p.6: s32[]) -> f32[8,100] {
  %p.4 = f32[8,100]{1,0} parameter(0)
  %p.5 = f32[1,100]{1,0} parameter(1)
  %p.6 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %updated = f32[8,100]{1,0} dynamic-update-slice(%p.4, %p.5, %p.6, %zero.1)
}

%body (state: (s32[], bf16[64,32], bf16[32,16], f32[8,100])) -> (s32[], bf16[64,32], bf16[32,16], f32[8,100]) {
  %state = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[32,16]{1,0} get-tuple-element(%state), index=2
  %rows = f32[8,100]{1,0} get-tuple-element(%state), index=3
  %matmul = bf16[64,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%matmul_computation
  %one_row = f32[1,100]{1,0} fusion(%rows, %i), kind=kLoop, calls=%slice_computation
  %put = f32[8,100]{1,0} fusion(%rows, %one_row, %i), kind=kLoop, calls=%update_computation
  %attended = (bf16[2,4,64,8]{3,2,1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "64", "64"]}, "mask_type": "CAUSAL"}}
  %mine = f32[64]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 1 : i32, name = "cayley_forward", num_warps = 4 : i32}
  %product = (bf16[64,16]{1,0}, f32[64,1]{1,0}) custom-call(%x, %w), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 1 : i32, name = "mlp_out", num_warps = 8 : i32}
  ROOT %next = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, f32[8,100]{1,0}) tuple(%i, %x, %w, %put)
}

%condition (state.1: (s32[], bf16[64,32], bf16[32,16], f32[8,100])) -> pred[] {
  %state.1 = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, f32[8,100]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%rare (q: f32[1000]) -> f32[1000] {
  %q = f32[1000]{0} parameter(0)
  ROOT %sorted = f32[1000]{0} sort(%q), dimensions={0}, to_apply=%add
}

%usual (r: f32[1000]) -> f32[1000] {
  ROOT %r = f32[1000]{0} parameter(0)
}

ENTRY %main (start: (s32[], bf16[64,32], bf16[32,16], f32[8,100]), g: f32[1000], c: pred[]) -> f32[1000] {
  %start = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, f32[8,100]{1,0}) parameter(0)
  %g = f32[1000]{0} parameter(1)
  %c = pred[] parameter(2)
  %loop = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, /*index=3*/f32[8,100]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %started = f32[1000]{0} all-reduce-start(%g), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %done = f32[1000]{0} all-reduce-done(%started)
  ROOT %either = f32[1000]{0} conditional(%c, %done, %done), true_computation=%rare, false_computation=%usual
}
"""  # noqa: E501 (as the compiler writes it)


NARROW = r"""
HloModule sums

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%most (c: bf16[], d: bf16[]) -> bf16[] {
  %c = bf16[] parameter(0)
  %d = bf16[] parameter(1)
  ROOT %larger = bf16[] maximum(%c, %d)
}

%wide (e: f32[], f: f32[]) -> f32[] {
  %e = f32[] parameter(0)
  %f = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%e, %f)
}

ENTRY %main (x: bf16[8,4], y: f32[8,4]) -> bf16[4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %y = f32[8,4]{1,0} parameter(1)
  %zero = bf16[] constant(0)
  %zero.1 = f32[] constant(0)
  %greatest = bf16[4]{0} reduce(%x, %zero), dimensions={0}, to_apply=%most
  %total = f32[4]{0} reduce(%y, %zero.1), dimensions={0}, to_apply=%wide
  ROOT %narrow = bf16[4]{0} reduce(%x, %zero), dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/block_1/reduce_sum"}
}
"""  # noqa: E501


def test_sums_in_bfloat16_are_found_by_their_scope():
    assert hlo.analyse(NARROW).narrow_sums == {"reduce bf16[4] jit(f)/block_1/reduce_sum": 1}
    assert not hlo.analyse(PROGRAM).narrow_sums


def test_counts_of_a_program_counted_by_hand() -> None:
    program = hlo.analyse(PROGRAM)
    kernels = {kernel.name: kernel for kernel in program.kernels}
    assert {name: k.times for name, k in kernels.items()} == {
        **dict.fromkeys(["matmul", "one_row", "put", "cudnn$fmhaSoftmax"], 6),
        **dict.fromkeys(["cayley_forward", "mlp_out"], 6),
        "sorted": 1,
    }
    assert kernels["matmul"].flops == 2 * 64 * 16 * 32
    assert kernels["matmul"].bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert kernels["one_row"].bytes == 400 + 400 + 4  # one row of eight is read
    assert kernels["put"].bytes == 400 + 400 + 4  # and one is written: the others stay
    # a causal half
    assert kernels["cudnn$fmhaSoftmax"].flops == 2 * 2 * (2 * 4 * 64 * 64) * 32 // 2
    assert kernels["cayley_forward"].bytes == 2 * 64 * 32 + 4 * 64
    assert kernels["sorted"].bytes == 8000  # of a conditional's branches the one that does most
    assert kernels["mlp_out"].flops == kernels["matmul"].flops
    assert kernels["mlp_out"].bytes == kernels["matmul"].bytes + 4 * 64
    names = "cudnn$fmhaSoftmax", "cayley_forward", "mlp_out"
    assert program.custom_kernels() == dict.fromkeys(names, 6)
    assert program.collective_counts() == {"all-reduce": (1, 4000)}
    assert program.collectives[0].group == 2
    products = 2 * kernels["matmul"].flops
    assert program.flops == 6 * (products + kernels["cudnn$fmhaSoftmax"].flops)
    assert program.seconds(1e30, 1e3) == pytest.approx(program.bytes / 1e3)
    assert program.seconds(1e3, 1e30) == pytest.approx(program.flops / 1e3)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0}", 30),
        ("(s32[2]{0}, (pred[7]{0}, u8[0]{0}))", 15),
        ("s4[10]", 5),
        ("f8e4m3fn[6]", 6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert hlo.size_of(text) == size


def test_flops_of_a_compiled_loop() -> None:
    """Seven turns of one product, and one outside. The compiler counts the loop's body once."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0] @ w

    compiled = jax.jit(f).lower(jnp.ones((48, 64)), jnp.ones((64, 64))).compile()
    assert hlo.analyse(compiled.as_text()).flops == 8 * 2 * 48 * 64 * 64


@pytest.mark.parametrize(("over", "group"), [(("data", "fsdp"), 8), (("fsdp",), 4), (("data",), 2)])
def test_collectives_of_a_compiled_program(over: tuple[str, ...], group: int) -> None:
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    sharding = NamedSharding(mesh, P(over))
    total = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=NamedSharding(mesh, P()))
    text = (
        total.lower(jax.ShapeDtypeStruct((8, 250), jnp.float32, sharding=sharding))
        .compile()
        .as_text()
    )
    program = hlo.analyse(text)
    assert program.collective_counts() == {"all-reduce": (1, 1000)}
    assert program.collectives[0].group == group


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.analyse("module { }")
