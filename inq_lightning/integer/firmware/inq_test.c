/* Predicts the test vectors and compares every logit: exit status 0 where all are equal. For a computer. */

#include <stdio.h>

#include "inq_network.h"
#include "inq_vectors.h"

int main(void)
{
    int32_t logits[INQ_OUTPUTS];
    unsigned long vector, wrong = 0, i;
    for (vector = 0; vector != INQ_VECTORS; ++vector) {
        inq_predict(inq_images[vector], logits);
        for (i = 0; i != INQ_OUTPUTS; ++i)
            wrong += logits[i] != inq_logits[vector][i];
    }
    printf("%lu of %lu logits differ\n", wrong, (unsigned long)INQ_VECTORS * INQ_OUTPUTS);
    return wrong != 0;
}
