// Large fresh buffers cost a page fault every 4 KiB; where the system offers huge pages on request, ask for them.
#pragma once

#include <cstddef>

namespace mgrpo {

// Advises huge pages for the whole 2 MiB pages inside [begin, begin + bytes). Contents and addresses do not change; a
// system without them goes on as before.
void use_huge_pages(void* begin, std::size_t bytes);

}  // namespace mgrpo
