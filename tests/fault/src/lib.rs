//! Broken parts under real traffic; needs root. Each test breaks one thing and
//! asks that nothing beside it breaks, and that whoever must know is told.
