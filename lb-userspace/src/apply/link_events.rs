//! Says when to compare the interfaces with what is expected: after a change of any interface, and once a second.

use futures_util::{StreamExt, stream::BoxStream};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Longest time between two comparisons.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time for further changes to arrive after the first: those of one command, such as a new name and a new state.
const SETTLE: Duration = Duration::from_millis(50);

/// Changes of interfaces, as the kernel announces them.
pub struct LinkEvents(BoxStream<'static, ()>);

impl LinkEvents {
    /// Subscribes to the changes. Without a subscription, there is still the interval. Needs a tokio runtime.
    pub fn open() -> Self {
        match new_multicast_connection(&[MulticastGroup::Link]) {
            Ok((connection, _, messages)) => {
                tokio::spawn(connection);
                Self(messages.map(drop).chain(futures_util::stream::pending()).boxed())
            }
            Err(error) => {
                tracing::warn!(%error, "cannot watch interfaces: changes are noticed once a second");
                Self(futures_util::stream::pending().boxed())
            }
        }
    }

    /// Waits for a change, or for the end of the interval. A host where interfaces change all the time costs one comparison
    /// per [`SETTLE`].
    pub async fn next(&mut self) {
        if timeout(INTERVAL, self.0.next()).await.is_ok() {
            sleep(SETTLE).await;
            while let Ok(Some(())) = timeout(Duration::ZERO, self.0.next()).await {}
        }
    }
}
