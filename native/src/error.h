// Errors inside the library are exceptions; `guarded` turns them into the C interface's results.
#pragma once

#include <cfenv>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace xl {

// The calling thread's last error, for xl_last_error.
std::string &last_error();

// The default floating-point modes, then the caller's again. A caller that rounds subnormal numbers
// to zero, as PyTorch's set_flush_denormal makes a thread do, gets the same bits as any other.
class DefaultFloats {
  public:
    DefaultFloats() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloats() { std::fesetenv(&saved_); }
    DefaultFloats(const DefaultFloats &) = delete;
    DefaultFloats &operator=(const DefaultFloats &) = delete;

  private:
    std::fenv_t saved_;
};

// `pointer`, which must not be NULL.
template <class T>
T *given(T *pointer, const char *what) {
    if (!pointer) throw std::runtime_error(std::string("there is no ") + what);
    return pointer;
}

// The result of `body`, or `failed` after an exception, whose text is kept.
template <class Body, class Result>
Result guarded(Result failed, Body body) {
    const DefaultFloats modes;
    try {
        return body();
    } catch (const std::bad_alloc &) {
        last_error() = "out of memory";
    } catch (const std::exception &error) {
        last_error() = error.what();
    }
    return failed;
}

}  // namespace xl
