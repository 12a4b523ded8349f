import logging

# Where there is AVX512, bitsandbytes looks for a kernel of another package as it is imported, for products that are not
# computed with it here, and warns that there is none: at each start, before what a user is to read.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
