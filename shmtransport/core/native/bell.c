#include "bell.h"

#include "futex.h"
#include "waiting.h"

void bell_post(struct bell *bell)
{
    atomic_fetch_add_explicit(&bell->posts, 1, memory_order_release);
    futex_wake(&bell->posts, true);
}

bool bell_take(struct bell *bell, struct message_ring *const *rings, size_t count)
{
    uint32_t posts = atomic_load_explicit(&bell->posts, memory_order_acquire);
    bool taken = posts != bell->seen;
    bell->seen = posts;
    for (size_t index = 0; index < count; index++)
        taken = message_ring_take_post(rings[index]) || taken;
    return taken;
}

bool bell_wait(struct bell *bell, struct message_ring *const *rings, size_t count, double seconds)
{
    struct futex_word words[MOST_FUTEX_WORDS];
    size_t most = count < MOST_FUTEX_WORDS ? count : MOST_FUTEX_WORDS - 1;
    words[0] = (struct futex_word){&bell->posts, bell->seen, true};
    for (size_t index = 0; index < most; index++)
        words[index + 1] = message_ring_peer_posts(rings[index]);
    double end = clock_seconds() + (count > most && seconds > LOOK_SECONDS ? LOOK_SECONDS : seconds);
    while (futex_wait_any(words, most + 1, end - clock_seconds()))
        if (bell_take(bell, rings, count))
            return true;
    return bell_take(bell, rings, count);
}
