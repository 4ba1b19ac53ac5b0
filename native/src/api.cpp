#include "error.h"
#include "xinslm.h"

namespace xl {

std::string &last_error() {
    thread_local std::string text;
    return text;
}

}  // namespace xl

int32_t xl_abi(void) { return XL_ABI; }

const char *xl_last_error(void) { return xl::last_error().c_str(); }
