/* Weights as lists: for each output and magnitude the inputs that are added and those that are subtracted. The fastest
 * layout.
 *
 * A list begins with how many there are of either kind, 8 bits each, and goes on with their places in bytes. From the
 * largest magnitude down, sums are shifted to the left on the way to the next one. */

#ifndef INQ_WEIGHTS_H
#define INQ_WEIGHTS_H

#include "inq_lanes.h"

typedef uint16_t inq_code;

typedef struct {
    const inq_code *codes;
    const uint8_t *gaps; /* shift to the left after each list */
    uint16_t inputs;     /* of one output */
    uint8_t lists;       /* of one output; a magnitude may have several */
} inq_weights_t;

static inline const inq_code *inq_dot1(const inq_weights_t *weights, const inq_code *list, const uint8_t *inputs,
                                       uint32_t *sum)
{
    const uint8_t *gap = weights->gaps, *end = gap + weights->lists;
    uint32_t total = 0;
    for (; gap != end; ++gap) {
        uint32_t head = *list++;
        const inq_code *middle = list + (head & 0xff), *last = middle + (head >> 8);
        while (list != middle)
            total += inputs[*list++];
        while (list != last)
            total -= inputs[*list++];
        total <<= *gap;
    }
    *sum = total;
    return list;
}

static inline const inq_code *inq_dot4(const inq_weights_t *weights, const inq_code *list, const uint32_t *columns,
                                       uint32_t *sums)
{
    const uint8_t *gap = weights->gaps, *end = gap + weights->lists;
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    for (; gap != end; ++gap) {
        uint32_t head = *list++, even = 0, odd = 0;
        const inq_code *middle = list + (head & 0xff), *last = middle + (head >> 8);
        while (list != middle) {
            uint32_t column = *(const uint32_t *)((const uint8_t *)columns + *list++);
            even += column & INQ_EVEN;
            odd += column >> 8;
        }
        while (list != last) {
            uint32_t column = *(const uint32_t *)((const uint8_t *)columns + *list++);
            even -= column & INQ_EVEN;
            odd -= column >> 8;
        }
        inq_spread(even, odd, sums);
        sums[0] <<= *gap;
        sums[1] <<= *gap;
        sums[2] <<= *gap;
        sums[3] <<= *gap;
    }
    return list;
}

#endif
