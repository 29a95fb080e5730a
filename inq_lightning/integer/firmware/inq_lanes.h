/* Sums of four pixels in two words, 16 bits each: pixels 0 and 2 in `even`, 1 and 3 in `odd`. All is linear modulo 2^32,
 * so what leaves its 16 bits on the way does no harm; the tables see to it that no sum lies beyond -32767 to 32767 when
 * it is taken out. */

#ifndef INQ_LANES_H
#define INQ_LANES_H

#include <stdint.h>

#define INQ_TAKE 0x80 /* in a gap: the magnitude after which sums are taken out */

typedef struct {
    uint32_t even, odd;
} inq_pair;

/* Adds to four sums, each with 2^15 more, so that nothing is borrowed: the bias subtracts what that makes in the end. */
static inline void inq_take(inq_pair lanes, uint32_t *sums)
{
    uint32_t even = lanes.even + (uint32_t)0x80008000, odd = lanes.odd + (uint32_t)0x80008000;
    sums[0] += even & 0xffff;
    sums[1] += odd & 0xffff;
    sums[2] += even >> 16;
    sums[3] += odd >> 16;
}

static inline void inq_shift(uint32_t *sums, uint8_t left)
{
    sums[0] <<= left;
    sums[1] <<= left;
    sums[2] <<= left;
    sums[3] <<= left;
}

#endif
