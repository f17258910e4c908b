//! The life of an attachment: pre-flight, attach, inject, update, recover
