//! Types shared by Hobble's command line, agent and operator
