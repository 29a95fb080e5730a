/* Sums of four pixels in two words: from a column, its bytes 0 and 2 are added to `even`, 16 bits apart, and the bytes
 * 1, 2 and 3, 8 bits apart, to `odd`. Neither sum of a pixel leaves -32767 to 32767 before it is taken out. */

#ifndef INQ_LANES_H
#define INQ_LANES_H

#include <stdint.h>

#define INQ_EVEN ((uint32_t)0x00ff00ff)

/* Adds both words to four sums, each with 2^15 more: what that makes in the end is subtracted by the bias. */
static inline void inq_spread(uint32_t even, uint32_t odd, uint32_t *sums)
{
    even += (uint32_t)0x80008000;
    odd += (uint32_t)0x80808000 - (even >> 16 << 8);
    sums[0] += even & 0xffff;
    sums[1] += odd & 0xffff;
    sums[2] += even >> 16;
    sums[3] += odd >> 16;
}

#endif
