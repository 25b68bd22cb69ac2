// Work shared among threads that are started for it.

#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace sda_fast {

// Into how many parts so many items are cut for up to `threads` threads, each worth at least `least` items.
inline std::size_t number_of_parts(std::size_t count, std::size_t least, std::size_t threads) {
    return std::max<std::size_t>(1, std::min(threads, count / std::max<std::size_t>(1, least)));
}

// Calls work(part, first, end) for every part of `count` items, each on a thread of its own; all but the last part have
// a multiple of `unit` items.
template <typename Work>
void in_parts(std::size_t count, std::size_t parts, std::size_t unit, const Work& work) {
    const std::size_t size = ((count + parts - 1) / parts + unit - 1) / unit * unit;
    std::vector<std::thread> others;
    others.reserve(parts);
    for (std::size_t first = size, part = 1; first < count; first += size, ++part) {
        const std::size_t end = std::min(first + size, count);
        try {
            others.emplace_back(work, part, first, end);
        } catch (const std::system_error&) {
            work(part, first, end);
        }
    }
    work(std::size_t{0}, std::size_t{0}, std::min(size, count));
    for (std::thread& other : others) other.join();
}

}  // namespace sda_fast
