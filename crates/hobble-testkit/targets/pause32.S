/* A 32-bit program that says it is ready and waits; only signals end it. */
    .globl _start
_start:
    mov $4, %eax            /* write(1, line, length) */
    mov $1, %ebx
    mov $line, %ecx
    mov $length, %edx
    int $0x80
again:
    mov $29, %eax           /* pause() */
    int $0x80
    jmp again
    .section .rodata
line:
    .ascii "{\"ready\":true,\"pids\":[]}\n"
    .set length, . - line
    .section .note.GNU-stack, "", @progbits
