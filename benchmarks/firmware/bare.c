/* Predicts the test vectors on a bare RISC-V under user-mode emulation, ROUNDS times. No library, so a call of a
 * multiplication routine does not link. Exit status: 0 where all logits are equal. Prints how many bytes of stack a
 * prediction takes, found by what is left of a pattern below the stack pointer. */

#include "inq_network.h"
#include "inq_vectors.h"

#ifndef ROUNDS
#define ROUNDS 1
#endif
#define PAINTED 4096

static int32_t logits[INQ_OUTPUTS];

/* A system call. QEMU takes its number from t0 in a program for RV32E, and else from register 17, which an assembler for
 * RV32E does not know: hence addi x17, x0, number as a word. */
#define CALL(number, a, b, c)                                                                                          \
    do {                                                                                                               \
        register long a0 __asm__("a0") = (long)(a);                                                                    \
        register long a1 __asm__("a1") = (long)(b);                                                                    \
        register long a2 __asm__("a2") = (long)(c);                                                                    \
        __asm__ volatile("li t0, %3\n\t.word %4\n\tecall"                                                              \
                         : "+r"(a0)                                                                                    \
                         : "r"(a1), "r"(a2), "i"(number), "i"((number) << 20 | 0x893)                                  \
                         : "memory", "t0");                                                                            \
    } while (0)

static void print(uint32_t number)
{
    static char text[11] = "         \n";
    char *end = text + 9;
    do {
        uint32_t tens = 0;
        for (; number >= 10; ++tens)
            number -= 10;
        *--end = (char)('0' + number);
        number = tens;
    } while (number);
    CALL(64, 1, text, 10);
}

static int predict(void)
{
    const uint8_t *image = inq_images[0];
    const int32_t *expected = inq_logits[0];
    unsigned vector, i;
    int wrong = 0;
    for (vector = 0; vector != INQ_VECTORS; ++vector, image += INQ_INPUTS) {
        inq_predict(image, logits);
        for (i = 0; i != INQ_OUTPUTS; ++i)
            wrong |= logits[i] != *expected++;
    }
    return wrong;
}

void begin(void)
{
    register volatile uint8_t *top __asm__("sp");
    volatile uint8_t *stack = top;
    unsigned round, i;
    int wrong = 0;
    for (i = 1; i != PAINTED; ++i)
        stack[-(long)i] = 0xa5;
    inq_predict(inq_images[0], logits);
    for (i = PAINTED - 1; i && stack[-(long)i] == 0xa5; --i)
        ;
    print(i);
    for (round = 0; round != ROUNDS; ++round)
        wrong |= predict();
    CALL(93, wrong, 0, 0);
}

__asm__(".globl _start\n"
        "_start:\n"
        ".option push\n"
        ".option norelax\n"
        "la gp, __global_pointer$\n"
        ".option pop\n"
        "j begin\n");
