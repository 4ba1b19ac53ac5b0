// Errors inside the library are exceptions; `guarded` turns them into the C interface's results.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace xl {

// The calling thread's last error, for xl_last_error.
std::string &last_error();

// The result of `body`, or `failed` after an exception, whose text is kept.
template <class Body, class Result>
Result guarded(Result failed, Body body) {
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
