//! Filter, trigger and fault: from a specification to a decision, pure and repeatable
