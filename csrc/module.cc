// The Python module plait.kernels._native.

#include "bindings.h"

NB_MODULE(_native, m) {
    // A tensor of torch that is alive when the interpreter ends keeps the memory that it is a view of.
    nanobind::set_leak_warnings(false);
    plait::bind_dispatch(m);
    plait::bind_linear(m);
    plait::bind_packing(m);
    plait::bind_attention(m);
    plait::bind_elementwise(m);
    plait::bind_decoder(m);
    plait::bind_share(m);
    plait::bind_collective(m);
}
