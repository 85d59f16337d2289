/* Where things lie in a segment: the same numbers as core/layout.py, core/message_ring.py and core/codec.py, held to them by a test. */
#ifndef SHMTRANSPORT_LAYOUT_H
#define SHMTRANSPORT_LAYOUT_H

#define FORMAT_VERSION 4

/* The message ring's cells, each at the start of a cache line, in this order; then its records. */
#define CELL_BYTES 64
enum cell { CELL_PUBLISHED, CELL_CONSUMED, CELL_WANTS_ROOM, CELL_ENDED, CELL_SLEEPS, CELL_POSTS, CELL_COUNT };
#define RECORDS_OFFSET (CELL_COUNT * CELL_BYTES)

/* A record: u32 length, payload, padding. */
#define LENGTH_BYTES 4
#define RECORD_ALIGNMENT 8
#define LARGEST_RECORDS 2 /* how many of the largest messages fit a ring */

/* A message: these two bytes, then an array that starts with its tag. */
#define MAGIC_BYTE 0xd5
enum tag { TAG_REQUEST = 6, TAG_REPLY = 7, TAG_FAILURE = 8 };
enum extension { EXTENSION_TENSOR = 1, EXTENSION_ARRAY = 2, EXTENSION_TUPLE = 3 };

/* What it may hold. */
#define MAX_DEPTH 32     /* of values */
#define ARGUMENT_DEPTH 2 /* at which an argument stands */
#define MAX_TENSORS 1024
#define MAX_NAME_CHARACTERS 256 /* of a method */
#define MAX_DIMENSIONS 16 /* of a tensor */

#endif
