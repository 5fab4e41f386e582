// What the parts of the Python module share. For module.cc and bind_*.cc only: it pulls in nanobind.

#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "table.h"

namespace plait {

void bind_dispatch(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_packing(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_share(nanobind::module_& m);
void bind_collective(nanobind::module_& m);

// The table called `isa`, or the one in use if `isa` is empty. ValueError, with what there is, if it is not available.
const KernelTable& table_named(const std::string& isa);

}  // namespace plait
