// Runs every function of every table that this machine has, compares it with plain code and prints
//   <table> <function> <ok or WRONG> <digest of the bits of its results>
// for each. Results are the same bits whatever the table, so the digests of one function are equal, between tables and
// between machines: tests/kernels/test_cross.py compares them. Exit status 1 if a function was wrong.
//
// With a name as argument, only that table's; with --names, only the names of the tables.

#include "check.h"

int plait::Check::failures = 0;

int main(int count, char** arguments) {
    using namespace plait;
    const std::string asked = count > 1 ? arguments[1] : "";
    int tables = 0;
    const KernelTable* const* table = available_tables(&tables);
    for (int i = 0; i < tables; ++i) {
        if (asked == "--names") {
            std::puts(table[i]->name);
        } else if (asked.empty() || asked == table[i]->name) {
            check_linear(*table[i]);
            check_attention(*table[i]);
            check_elementwise(*table[i]);
            std::fflush(stdout);
        }
    }
    return Check::failures > 0;
}
