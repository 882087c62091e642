// Device addresses and what lies behind them; used by the copies.
#pragma once
#include "standin.h"

#include <shared_mutex>

namespace standin {

// Held shared by whoever touches memory behind device addresses, alone by whoever maps or unmaps.
std::shared_mutex &mapping();

// The kinds of address a copy meets.
enum class Place { device, pinned, pageable, nowhere };
Place place(uint64_t at, size_t size);

}  // namespace standin
