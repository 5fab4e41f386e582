// Which instruction sets there are and which one is in use.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings.h"

namespace plait {
namespace {

std::vector<std::string> isa_names() {
    int count = 0;
    const KernelTable* const* tables = available_tables(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->name);
    return names;
}

}  // namespace

const KernelTable& table_named(const std::string& isa) {
    const char* reason = nullptr;
    if (isa.empty()) {
        const KernelTable* current = current_table(&reason);
        if (!current) throw nanobind::value_error(reason);
        return *current;
    }
    int count = 0;
    const KernelTable* const* tables = available_tables(&count);
    std::string known;
    for (int i = 0; i < count; ++i) {
        if (isa == tables[i]->name) return *tables[i];
        known += (i ? ", " : "") + std::string(tables[i]->name);
    }
    throw nanobind::value_error(("the kernels have no instruction set '" + isa + "' here; there are: " + known).c_str());
}

void bind_dispatch(nanobind::module_& m) {
    m.def("isa_names", isa_names, "Instruction sets that were compiled in and run on this machine, best first.");
    m.def(
        "current_isa", [] { return std::string(table_named("").name); },
        "The one in use. ValueError if PLAIT_ISA asks for one that is not available.");
}

}  // namespace plait
